"""What the commands compare, analyze and train do, from Python; the commands call these functions."""

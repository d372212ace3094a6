"""The studio: samplers side by side on a page, evaluation by evaluation; ``fewstep studio``.

``engine`` draws and measures, without any page: a request in, events out. ``session`` runs it in a thread for one
user, and ``page`` (which needs the extra ``studio``) shows the events.
"""

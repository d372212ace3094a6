"""A network of your own: say what it predicts and on which schedule it was trained; everything else follows."""

import torch
from torch import Tensor, nn

import fewstep


class Network(nn.Module):
    """Predicts the noise of points in the plane; time is an index from 0 to 999, labels are classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None] / 1000, labels[:, None].float()], 1))


schedule = fewstep.schedule("ddpm-linear")
network = Network()

# Some seconds of training by anyone's loop: noise on two classes of points.
optimizer = torch.optim.Adam(network.parameters(), 2e-3)
for _ in range(600):
    labels = torch.randint(2, (256,))
    data = torch.randn(256, 2) * 0.2 + (2.0 * labels[:, None] - 1)
    t = torch.randint(1000, (256,))
    alpha, sigma = (f(t.double()).float()[:, None] for f in (schedule.alpha, schedule.sigma))
    noise = torch.randn_like(data)
    loss = (network(alpha * data + sigma * noise, t.float(), labels) - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

denoiser = fewstep.Denoiser.wrap(network, schedule=schedule, prediction="eps", event_shape=(2,))
for label in (0, 1):
    samples = fewstep.sample(denoiser, 1000, nfe=8, labels=label)
    print(f"class {label}: mean {samples.mean(0).tolist()}, deviation {float(samples.std()):.2f}")

"""The network of a checkpoint or of published weights in torch, as sample.py draws with it."""

import hashlib
from functools import partial

import torch

from beyond import as_eps, guided, sample_progressive
from ddpm import Diffusion
from ddpm_numpy import Network
from support.device import (
    can_compile,
    choose_device,
    compiled,
    prefer_accuracy,
    prefer_speed,
    to_device,
    uses_bfloat16,
)
from support.trained import load


class TorchNetwork:
    """A trained network on a device, with what sample.py asks of a ddpm_numpy.Network.

    path: see support.trained.load. device: see choose_device. amp: whether the network computes in
    bfloat16; if None, where train.py would. images, batch, steps: how many images will be drawn in
    total and at a time, in how many steps (T if None). The network is compiled where train.py would
    compile it, for 5,000 calls with full batches.

    Attributes: betas, variance, shape, classes and labels are those of Network, and provider says
    where and in which precision it computes. Exits if the weights or the device are not there, or
    if the device can only emulate bfloat16.
    """

    labels = Network.labels

    def __init__(self, path, device="auto", amp=None, images=0, batch=64, steps=None):
        trained, self.device = load(path), choose_device(device)
        self.betas, self.variance = trained.betas, trained.variance
        self.shape, self.classes = trained.shape, list(trained.classes)
        self.amp = uses_bfloat16(trained.predicts, self.device, amp)
        (prefer_speed if self.amp else prefer_accuracy)()
        self.provider = f"{self.device}, {'bfloat16' if self.amp else 'float32'}"
        self.model, self.batch = trained.model.to(self.device), batch
        calls = images // batch * (steps or len(self.betas))
        compiles = calls >= 5000 and can_compile(self.device)
        self.fast = compiled(self.model) if compiles else self.model
        self.eps = as_eps(self.forward, trained.diffusion, trained.predicts)

    def forward(self, x_t, *inputs):
        """Return the output of the network in float32."""
        model = self.fast if len(x_t) == self.batch else self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return model(x_t, *inputs).float()

    def digest(self):
        """Return a hash of the weights, as a string."""
        total = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            total.update(name.encode() + tensor.cpu().numpy().tobytes())
        return total.hexdigest()

    def reverse(self, y, guidance, draw_noise, betas, x_T=None, known=None, **options):
        """Return the loop of beyond.py on the device, for the arguments of Network.reverse.

        x_t and x0_hat are float32 tensors on the device.
        """
        to = partial(to_device, device=self.device)
        eps = self.eps if y is None else guided(self.eps, to(torch.from_numpy(y)), guidance)
        return sample_progressive(
            Diffusion(torch.from_numpy(betas), self.variance), eps, None,
            draw_noise=lambda: to(torch.from_numpy(draw_noise())),
            x_T=None if x_T is None else to(torch.from_numpy(x_T)),
            known=known and [to(torch.from_numpy(part)) for part in known], **options,
        )  # fmt: skip

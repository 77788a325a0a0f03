"""The network of a checkpoint or of published weights in torch, as sample.py draws with it."""

import hashlib

import torch

from beyond import as_eps, guided, sample_progressive
from support import device
from support.trained import Trained, load


class TorchNetwork(Trained):
    """A Trained on a device, with the attributes of a ddpm_numpy.Network that sample.py uses.

    path: see support.trained.load. name: see device.choose_device. amp: whether the network
    computes in bfloat16; if None, as in train.py. images, batch, steps: the total number of images,
    the number drawn together, and the number of steps (T if None). The network is compiled where
    train.py would compile it, if there are at least 5,000 calls with full batches.

    provider says where and in which precision it computes. Exits if the weights or the device are
    not there, or if the device can only emulate bfloat16.
    """

    def __init__(self, path, name="auto", amp=None, images=0, batch=64, steps=None):
        super().__init__(**vars(load(path)))
        self.device, self.batch = device.choose_device(name), batch
        self.amp = device.uses_bfloat16(self.predicts, self.device, amp)
        (device.prefer_speed if self.amp else device.prefer_accuracy)()
        self.provider = f"{self.device}, {'bfloat16' if self.amp else 'float32'}"
        self.fast = self.model.to(self.device)
        calls = images // batch * (steps or self.diffusion.T)
        if calls >= 5000 and device.can_compile(self.device):
            self.fast = device.compiled(self.model)
        self.eps = as_eps(self.forward, self.diffusion, self.predicts, self.device)

    @property
    def betas(self):
        """The schedule, float64 (T,), as an array."""
        return self.diffusion.betas.numpy()

    def forward(self, x_t, *inputs, **condition):
        """Return the output of the network in float32."""
        model = self.fast if len(x_t) == self.batch else self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return model(x_t, *inputs, **condition).float()

    def digest(self):
        """Return a hash of the weights and, if it is not float32, of the precision, as a string."""
        total = hashlib.sha256(b"bfloat16" if self.amp else b"")
        for name, tensor in self.model.state_dict().items():
            total.update(name.encode() + tensor.cpu().numpy().tobytes())
        return total.hexdigest()

    def reverse(self, y, guidance, draw_noise, start=None, x_T=None, known=None, **options):
        """Return the loop of beyond.py on the device, for the arguments of Network.reverse.

        x_t and x0_hat are float32 tensors on the device.
        """

        def on_device(array):
            return device.to_device(torch.from_numpy(array), self.device)

        diffusion, eps = self.diffusion, self.eps
        if start is not None:
            diffusion = type(diffusion)(diffusion.betas[: start + 1], diffusion.variance)
        return sample_progressive(
            diffusion, eps if y is None else guided(eps, on_device(y), guidance), None,
            draw_noise=lambda: on_device(draw_noise()), x_T=None if x_T is None else on_device(x_T),
            known=known and [*map(on_device, known)], **options,
        )  # fmt: skip

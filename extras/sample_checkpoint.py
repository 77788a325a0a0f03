"""Generate images from a run in torch, without an export, on any accelerator.

    python -m extras.sample_checkpoint run                 # with the flags of sample.py
    python -m extras.sample_checkpoint run --device cuda:1

The noise is the same as with a model.onnx. With all T steps, the loop is Algorithm 2 in ddpm.py.
"""

import torch

import sample
from extras.variants import sample_progressive
from run import choose_device, has_bfloat16, load, to_device


class TorchNetwork:
    """eps_theta(x_t, t) of a run: float32 tensors (B, C, H, W) on its device, and t, to eps.

    A call takes t as an int or int64 (B,), and with classes y, int64 (B,); None stands for "no
    class". It computes in bfloat16 if the run did, and the device can.

    path: a run folder or its checkpoint.pt. device: auto, cpu, cuda, cuda:1, mps or xpu.
    Attributes: as in sample.Network, and diffusion. Exits if the run or the device is not there.
    """

    def __init__(self, path, device="auto"):
        self.network, self.diffusion, state = load(path)
        self.device = choose_device(device)
        self.amp = bool(state["settings"]["amp"] and has_bfloat16(self.device))
        self.network.to(self.device)
        if self.amp:  # convert the weights once, and not in each step
            for module in self.network.modules():
                if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                    module.bfloat16()
        else:  # float32 as float32, whereas cuDNN's convolutions use TF32 by default
            torch.backends.cudnn.allow_tf32 = False
        self.betas, self.variance = self.diffusion.betas.numpy(), self.diffusion.variance
        self.shape, self.classes = tuple(state["shape"]), list(state["names"])
        self.provider = f"{self.device}, {'bfloat16' if self.amp else 'float32'}"

    @torch.no_grad()
    def __call__(self, x_t, t, y=None):
        t = t if isinstance(t, torch.Tensor) else torch.full((len(x_t),), t, device=self.device)
        y = None if y is None else torch.as_tensor(y, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            eps = self.network(x_t, t, y).float()
        return eps.where(eps.isfinite(), torch.nan)  # the clip would hide infinity

    def reverse(self, eps, draw_noise, **options):
        """Return variants.sample_progressive on the device: with all steps, the loop of ddpm.py.

        eps: the network, `guided` or not. draw_noise() returns arrays.
        """
        options["draw_noise"] = lambda: to_device(torch.from_numpy(draw_noise()), self.device)
        return sample_progressive(self.diffusion, eps, **options)


def main():
    parser = sample.flags(__doc__, onnx=False)
    parser.add_argument("run", help="the folder of a run, or its checkpoint.pt")
    sample.main(parser, lambda args: TorchNetwork(args.run, args.device))


if __name__ == "__main__":
    main()

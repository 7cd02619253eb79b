"""The optimizers of targets, static drafts and the learner."""

import torch

from support.precision import fast_dtype


def orthogonal(matrix):
    """Nearly U V^T of the matrix's singular value decomposition U S V^T: five Newton-Schulz steps
    with the coefficients of Jordan et al., after which singular values lie around 1."""
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else fast_dtype())
    x = x.T if len(matrix) > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): SGD with Nesterov momentum, each matrix's step made orthogonal.
    torch.optim.Muon is the same in bfloat16, whatever the processor."""

    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - momentum)
                step = orthogonal(p.grad.lerp(average, momentum))
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(step, alpha=lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def muon_and_adamw(model, lr, weight_decay=0.0):
    """Muon on the matrices, AdamW at a seventh of its rate on embedding, head and norms.  A Muon
    step turns a matrix by the same amount in every direction that has a gradient: one answer moves
    a trained draft without wrecking it, and a random one learns what is rare as fast as what is
    common."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inner = {n for n, p in trained if p.ndim == 2 and "embed" not in n and "head" not in n}
    matrices = [p for n, p in trained if n in inner]
    rest = [p for n, p in trained if n not in inner]
    muon = Muon(matrices, lr, weight_decay=weight_decay)
    return [muon, torch.optim.AdamW(rest, lr=0.15 * lr, betas=(0.9, 0.95), weight_decay=0.0)]

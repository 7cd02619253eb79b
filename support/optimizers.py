"""The optimizers of targets, static drafts and the learner."""

import torch


def muon_and_adamw(model, lr, weight_decay=0.0):
    """Muon (Jordan et al. 2024) on the matrices, AdamW at a seventh of its rate on embedding, head
    and norms.  A Muon step turns a matrix by the same amount in every direction that has a
    gradient: one answer moves a trained draft without wrecking it, and a random one learns what is
    rare as fast as what is common."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inner = {n for n, p in trained if p.ndim == 2 and "embed" not in n and "head" not in n}
    matrices = [p for n, p in trained if n in inner]
    rest = [p for n, p in trained if n not in inner]
    muon = torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=weight_decay)
    return [muon, torch.optim.AdamW(rest, lr=0.15 * lr, betas=(0.9, 0.95), weight_decay=0.0)]

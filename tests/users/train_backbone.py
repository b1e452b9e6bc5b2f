"""A few steps of training with nothing but torch: a user of the backbone alone."""

import torch

from elsa_core import ELSASwin

torch.manual_seed(0)
backbone = ELSASwin("tiny")
images, wanted = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
head = torch.nn.Linear(96 + 192 + 384 + 768, 2)
parameters = [*backbone.parameters(), *head.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=1e-4)
losses = []
for _ in range(8):
    logits = head(torch.cat([each.mean((2, 3)) for each in backbone(images)], 1))
    loss = torch.nn.functional.cross_entropy(logits, wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert all(p.grad is not None for p in parameters if p.requires_grad), "a parameter has no gradient"
assert losses[-1] < losses[0] / 2, f"the loss did not fall: {losses}"
print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f}")

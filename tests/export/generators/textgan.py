"""A recurrent text generator in the manner of SeqGAN (Yu et al. 2017) and Gumbel-softmax GANs (Kusner and
Hernandez-Lobato 2016): a GRU unrolled from z, feeding its soft choice back; z to token logits."""

import torch
from torch import nn


class Generator(nn.Module):
    def __init__(self, latent: int = 16, hidden: int = 24, vocabulary: int = 30, length: int = 5) -> None:
        super().__init__()
        self.start = nn.Linear(latent, hidden)
        self.embedding = nn.Linear(vocabulary, 12, bias=False)
        self.cell = nn.GRUCell(12, hidden)
        self.read = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)
        self.vocabulary, self.length = vocabulary, length

    def forward(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.start(z))
        choice = z.new_zeros(z.shape[0], self.vocabulary)
        states = []
        for _ in range(self.length):
            hidden = self.cell(self.embedding(choice), hidden)
            choice = torch.softmax(self.head(hidden) / 0.7, -1)
            states.append(hidden)
        sequence, _ = self.read(torch.stack(states, 1))
        logits = self.head(sequence)
        return {"logits": logits, "state": sequence[:, -1]}


def make() -> nn.Module:
    torch.manual_seed(0)
    return Generator()

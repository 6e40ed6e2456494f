"""Recurrent, attention and U-shaped architectures in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo.entry import Entry
from zoo.plain import images, tokens


class ExpRnn(nn.Module):
    """A language model whose recurrent matrix is orthogonal (Lezcano-Casado and Martínez-Rubio 2019)."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.cell = nn.RNNCell(8, hidden, bias=False)
        parametrizations.orthogonal(self.cell, "weight_hh", "matrix_exp")
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.decode = nn.Linear(hidden, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        state, outputs = x.new_zeros(x.shape[0], self.bias.shape[0]), []
        for step in range(x.shape[1]):
            pre = F.linear(x[:, step], self.cell.weight_ih) + F.linear(state, self.cell.weight_hh)
            # modReLU
            state = pre.sign() * (pre.abs() + self.bias).relu()
            outputs.append(state)
        return self.decode(torch.stack(outputs, 1))


class WeightDrop(nn.Module):
    """Drops recurrent weights; sets the dropped weight on the wrapped layer at each call, as AWD-LSTM does."""

    def __init__(self, layer: nn.LSTM, p: float) -> None:
        super().__init__()
        self.layer, self.p = layer, p
        self.raw = nn.Parameter(layer.get_parameter("weight_hh_l0").detach().clone())
        del layer._parameters["weight_hh_l0"]
        self._set()

    def _set(self) -> None:
        # A new tensor in both modes: a parameter would be registered.
        self.layer.weight_hh_l0 = F.dropout(self.raw, self.p) if self.training else self.raw.clone()

    def forward(self, x: Tensor) -> Tensor:
        self._set()
        return self.layer(x)[0]


class AwdLstm(nn.Module):
    """A language model with dropped weights, locked dropout and tied embeddings (Merity and others 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(WeightDrop(nn.LSTM(a, b, batch_first=True), 0.3) for a, b in ((8, 12), (12, 12), (12, 8)))
        self.decode = nn.Linear(8, 20)
        self.decode.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            keep = F.dropout(torch.ones_like(x[:, :1]), 0.2, self.training)
            x = layer(x * keep)
        return self.decode(x)


class LstmTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True)
        self.decode = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decode(self.lstm(self.embed(ids))[0])


class Seq2Seq(nn.Module):
    """``nn.Transformer`` with its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.body = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True)
        self.decode = nn.Linear(16, 20, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.embed.weight.dtype)
        return self.decode(self.body(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True))


class Experts(nn.Module):
    """A sparse mixture: each token goes to two of four experts."""

    def __init__(self, size: int = 16, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(size, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        gates = torch.zeros_like(self.router(x)).scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))
        return x + sum(gates[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class ExpertModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.Sequential(Experts(), nn.LayerNorm(16), Experts(), nn.LayerNorm(16))
        self.decode = nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decode(self.blocks(self.embed(ids)))


def _double(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Ronneberger and others 2015, padded."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_double(3, 4), _double(4, 8), _double(8, 16)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)])
        self.merge = nn.ModuleList([_double(16, 8), _double(8, 4)])
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], 1))
        return self.head(x)


ENTRIES = (
    Entry("expRNN language model", "plain", ExpRnn, tokens, light=True),
    Entry("AWD-LSTM language model", "plain", AwdLstm, tokens),
    Entry(
        "BiLSTM tagger",
        "plain",
        LstmTagger,
        tokens,
        spec={"lstm.weight_hh_l*": "orthogonal", "lstm.weight_ih_l*": "weight norm"},
    ),
    Entry(
        "Transformer, encoder and decoder",
        "plain",
        Seq2Seq,
        lambda: ((torch.randint(0, 20, (2, 6)), torch.randint(0, 20, (2, 5))), {}),
        spec={"body.*.in_proj_weight": "lora", "body.*.out_proj.weight": "orthogonal"},
    ),
    Entry("mixture of experts", "plain", ExpertModel, tokens, spec={"blocks.*.experts.*.weight": "low rank"}),
    Entry("U-Net", "plain", UNet, lambda: images(3), spec={"down.*.0.weight": "weight norm", "up.*.weight": "weight norm"}),
)

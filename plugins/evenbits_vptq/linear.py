"""Layers that compute from the stored indices: outlier columns have codes and a codebook of their own, and a sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evenbits.compressor import LayerShape
from evenbits.kernels.codebook import CodebookLinear
from evenbits.kernels.codebook_held import share
from evenbits.kernels.launch import Choice
from evenbits.kernels.weights import CodebookWeight, Stream
from evenbits.maths.stored import load_codebook
from evenbits_vptq.columns import load_columns
from evenbits_vptq.options import VptqOptions, width_of


class OutlierLinear(nn.Module):
    """The products of two sets of input columns, added in float32; slabs (many rows) round each before."""

    def __init__(self, others: Tensor, outliers: Tensor, main: CodebookLinear, apart: CodebookLinear) -> None:
        """others, outliers: the input columns of each, int64."""
        super().__init__()
        self.register_buffer("others", others)
        self.register_buffer("outliers", outliers)
        self.main, self.apart = main, apart

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is kept between calls."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def choice(self, rows: int) -> Choice:
        """What computes the columns that are not outliers; the outliers' go the same way."""
        return self.main.choice(rows)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., in), any float dtype -> (..., out) of that dtype."""
        others, outliers = self.get_buffer("others"), self.get_buffer("outliers")
        wide = torch.promote_types(inputs.dtype, torch.float32)
        found: Tensor = self.main(inputs[..., others], wide) + self.apart(inputs[..., outliers], wide)
        return found.to(inputs.dtype)


def packed_linear(
    tensors: Mapping[str, Tensor],
    books: Mapping[str, Tensor],
    suffix: str,
    layer: LayerShape,
    options: VptqOptions,
    device: torch.device,
) -> CodebookLinear | OutlierLinear:
    """tensors: of the layer. books: where its codebooks are, under names that end in `suffix`."""
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    outliers, others, group = load_columns(tensors, layer.in_features, options)
    book = group.to(torch.int32) if options.groups > 1 else None
    streams = [_stream(tensors["codes"], books, "codebook", suffix, options, book)]
    if options.residual_size is not None:
        streams.append(_stream(tensors["residual_codes"], books, "residual_codebook", suffix, options, book))
    main = CodebookLinear(_weight(streams, options.v, others, layer, tensors, options))
    if not outliers.numel():
        return main
    apart = [_stream(tensors["outlier_codes"], books, "outlier_codebook", suffix, options, None)]
    return OutlierLinear(
        others, outliers, main, CodebookLinear(_weight(apart, options.outlier_v, outliers, layer, tensors, options))
    )


def _stream(
    codes: Tensor, books: Mapping[str, Tensor], name: str, suffix: str, options: VptqOptions, book: Tensor | None
) -> Stream:
    """Codebooks of 16 bits as they are stored, of 8 bits times their step; layers share them either way."""
    stored = books[name + suffix]
    found = stored if options.codebook_bits == 16 else load_codebook(books, 8, name, suffix)
    found = found.to(codes.device)
    found = found if found is stored else share(found)
    found = found if found.ndim == 3 else found[None]
    return Stream(codes, found, width_of(found.shape[1]), book=book)


def _weight(
    streams: list[Stream],
    v: int,
    columns: Tensor,
    layer: LayerShape,
    tensors: Mapping[str, Tensor],
    options: VptqOptions,
) -> CodebookWeight:
    gain = offset = rows = None
    if options.scales != "none":
        scale = tensors["scale"].float()
        if options.scales == "column":
            gain = scale[columns, None]
        else:
            rows = scale.expand(layer.out_features)
    if options.column_bias:
        offset = tensors["bias"].float()[columns, None]
    return CodebookWeight(tuple(streams), layer.out_features, columns.numel(), v, "out", gain, offset, rows)

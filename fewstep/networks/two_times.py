"""Models of diffusers with a second time: they predict the average over the times from s to t.

The first time goes where the model's own time goes. The second goes in as ``second_time`` says:

* ``t``: an embedding of t is added to that of s; its last layer starts at zero, so that the model starts as it was;
* ``span``: the same of t - s;
* ``late``: the last blocks are told t in the place of s, by the same embedding (arXiv 2510.24474): no new weights.

At s = t a new model of each kind predicts what the one it was made of does, to the last bit. Where it is
``told_guidance``, it has one more input, the strength of guidance (arXiv 2210.03142), as silent at first.

An export carries this file, those it imports put in, beside its weights, so they need torch and diffusers alone.
"""

import functools
import inspect
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from .calls import call_conditional_unet, call_dit, call_flux, call_pixart, call_sd3, call_unet, call_wan
from .rows import (
    EachHalf,
    LabelAndTimes,
    RowEmbedding,
    RowProjection,
    hear,
    last_token,
    one_time,
    second_of_two,
    twice,
    with_room,
)

SECOND_TIMES = ("t", "span", "late")


class TwoTimes:
    """What a model below has more than its parent: two keys of its config, and ``predict``."""

    def __init__(self, *args: Any, second_time: str = "t", told_guidance: bool = False, **config: Any) -> None:
        if second_time not in SECOND_TIMES:
            raise ValueError(f"second_time is {second_time!r}: it is one of {', '.join(SECOND_TIMES)}")
        super().__init__(*args, **config)
        self.second_time, self.told_guidance = second_time, told_guidance
        model: Any = self
        model.register_to_config(second_time=second_time, told_guidance=told_guidance)
        self.take_rows(late=second_time == "late", guided=told_guidance)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        parent = next((c for c in cls.__mro__ if c.__module__.startswith("diffusers.")), None)
        if parent is None:
            return

        def make(self: Any, *args: Any, **config: Any) -> None:
            TwoTimes.__init__(self, *args, **config)

        # diffusers reads off the signature what belongs into a config.
        keys = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in (("second_time", "t"), ("told_guidance", False))
        ]
        signature: Any = inspect.signature(parent.__init__)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        made: Any = make
        made.__signature__ = signature.replace(parameters=[*own, *keys])
        cls.__init__ = made

    def take_rows(self, late: bool, guided: bool) -> None:
        """Have the model take rows of times, and of the strength of guidance, in the place of times."""
        raise NotImplementedError

    def predict(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor | None = None, **cond: Any) -> Tensor:
        """The prediction at x (B, ...), averaged from s to t, both (B,) in timesteps of the model.

        A module around this one, such as a compiled one, may stand in for ``self``: it calls that.

        Args:
            guidance: its strength (B,), for a model that is told it; 1, which is none, if not given.
            cond: the conditions of the model, by their names in diffusers.
        """
        raise NotImplementedError

    def rows(self, s: Tensor, t: Tensor, guidance: Tensor | None) -> Tensor:
        """What the model is told beside s: (B, 1), or (B, 2) with the strength of guidance behind.

        Raises:
            ValueError: a strength for a model that is told none.
        """
        if guidance is not None and not self.told_guidance:
            raise ValueError(f"guidance for a {type(self).__name__} that is told no strength of it: leave it out")
        second = t - s if self.second_time == "span" else t
        if not self.told_guidance:
            return second[:, None]
        strength = torch.ones_like(t) if guidance is None else guidance.to(t)
        # Strengths are a few units; the frequencies of the embedding are made for hundreds.
        return torch.stack([second, 100 * strength], dim=-1)


class TwoTimeTransformer(TwoTimes):
    """A transformer: its ``timestep`` is rows of s, t and, where it is told it, 100 times the strength of guidance."""

    call: Any
    last_share = 1 / 3  # of the blocks, told t in the place of s where the second time is ``late``

    def predict(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor | None = None, **cond: Any) -> Tensor:
        rows = torch.cat([s[:, None], self.rows(s, t, guidance)], dim=-1)
        return self.call(self, x, rows, **cond)

    def embed_rows(self, embeddings: Any, late: bool, guided: bool) -> None:
        """Have the modules ``time_proj`` and ``timestep_embedder`` of a combined embedding take rows."""
        embeddings.time_proj = RowProjection(embeddings.time_proj)
        embeddings.timestep_embedder = RowEmbedding(embeddings.timestep_embedder, late, guided)

    def tell_late(self, blocks: list[Any], *heads: Any, width: int, dim: int = 2) -> None:
        """Of two embeddings of ``width`` in one the last blocks and the heads hear the second, the others the first."""
        for block, is_last in [*self.by_turn(blocks), *((head, True) for head in heads)]:
            block.register_forward_pre_hook(
                functools.partial(hear, width=width, dim=dim, late=is_last), with_kwargs=True
            )

    def by_turn(self, blocks: Any) -> list[tuple[Any, bool]]:
        """Blocks, and whether each is among the last, which there is one of at least."""
        first = len(blocks) - max(1, round(self.last_share * len(blocks)))
        return [(block, k >= first) for k, block in enumerate(blocks)]


class LabelledTimes(TwoTimes):
    """A U-Net: its ``class_labels`` are rows of the label, where it has classes, of t, and of 100 times the strength of
    guidance, where it is told it."""

    call: Any

    def take_rows(self, late: bool, guided: bool) -> None:
        _widen_labels(self, late, guided)

    def predict(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        guidance: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
        **cond: Any,
    ) -> Tensor:
        return self.call(self, x, s, class_labels=_labelled(class_labels, self.rows(s, t, guidance)), **cond)


class TwoTimeUNet2DModel(LabelledTimes, UNet2DModel):
    """A ``UNet2DModel``."""

    call = staticmethod(call_unet)


class TwoTimeUNet2DConditionModel(LabelledTimes, UNet2DConditionModel):
    """A ``UNet2DConditionModel``."""

    call = staticmethod(call_conditional_unet)

    def take_rows(self, late: bool, guided: bool) -> None:
        if late and self.config["time_cond_proj_dim"] is not None:
            raise ValueError("second_time: late, and this U-Net takes a timestep_cond with its time: say t")
        super().take_rows(late, guided)
        if late and hasattr(self, "add_embedding"):  # which is added to both times' embeddings
            self.add_embedding.register_forward_hook(twice)


class TwoTimeDiTTransformer2DModel(TwoTimeTransformer, DiTTransformer2DModel):
    """A ``DiTTransformer2DModel``, each block of which embeds the times by itself."""

    call = staticmethod(call_dit)

    def take_rows(self, late: bool, guided: bool) -> None:
        blocks: Any = self.transformer_blocks
        for block in blocks:
            self.embed_rows(block.norm1.emb, late, guided)
            if late:  # rows of two times come from the head alone, which hears the second
                block.norm1.emb.register_forward_pre_hook(
                    functools.partial(one_time, late=True, guided=guided), with_kwargs=True
                )
        if late:
            for block, is_last in self.by_turn(blocks):
                block.register_forward_pre_hook(
                    functools.partial(one_time, late=is_last, guided=guided), with_kwargs=True
                )


class TwoTimePixArtTransformer2DModel(TwoTimeTransformer, PixArtTransformer2DModel):
    """A ``PixArtTransformer2DModel``."""

    call = staticmethod(call_pixart)

    def take_rows(self, late: bool, guided: bool) -> None:
        norm: Any = self.adaln_single
        width = self.inner_dim
        self.embed_rows(norm.emb, late, guided)
        if late:
            if self.use_additional_conditions:
                raise ValueError("second_time: late, and a PixArt is told the size of the image with its time: say t")
            norm.silu, norm.linear = nn.Identity(), EachHalf(norm.linear)
            norm.register_forward_hook(functools.partial(second_of_two, width=width))
            self.tell_late(list(self.transformer_blocks), width=6 * width)


class TwoTimeSD3Transformer2DModel(TwoTimeTransformer, SD3Transformer2DModel):
    """An ``SD3Transformer2DModel``."""

    call = staticmethod(call_sd3)

    def take_rows(self, late: bool, guided: bool) -> None:
        self.embed_rows(self.time_text_embed, late, guided)
        if late:
            self.time_text_embed.text_embedder.register_forward_hook(twice)
            self.tell_late(list(self.transformer_blocks), self.norm_out, width=self.inner_dim)


class TwoTimeFluxTransformer2DModel(TwoTimeTransformer, FluxTransformer2DModel):
    """A ``FluxTransformer2DModel``; one that takes a guidance of its own goes on doing so, by the same name."""

    call = staticmethod(call_flux)

    def take_rows(self, late: bool, guided: bool) -> None:
        if guided and self.config["guidance_embeds"]:
            raise ValueError("this Flux is told the strength of guidance as it is: leave guidance out")
        embeddings: Any = self.time_text_embed
        self.embed_rows(embeddings, late, guided)
        if late:
            for name in ("text_embedder", "guidance_embedder"):
                if hasattr(embeddings, name):
                    getattr(embeddings, name).register_forward_hook(twice)
            blocks = [*self.transformer_blocks, *self.single_transformer_blocks]
            self.tell_late(blocks, self.norm_out, width=self.inner_dim)

    def predict(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor | None = None, **cond: Any) -> Tensor:
        if self.config["guidance_embeds"]:
            return call_flux(self, x, torch.stack([s, self.rows(s, t, None)[:, 0]], dim=-1), guidance=guidance, **cond)
        return TwoTimeTransformer.predict(self, x, s, t, guidance, **cond)


class TwoTimeWanTransformer3DModel(TwoTimeTransformer, WanTransformer3DModel):
    """A ``WanTransformer3DModel``, which takes rows of times as they are: one for each token, of which there is one."""

    call = staticmethod(call_wan)

    def take_rows(self, late: bool, guided: bool) -> None:
        embeddings: Any = self.condition_embedder
        embeddings.time_embedder = RowEmbedding(embeddings.time_embedder, late, guided, is_stacked=True)
        if late:
            embeddings.act_fn, embeddings.time_proj = nn.Identity(), EachHalf(embeddings.time_proj, dim=1)
            embeddings.register_forward_hook(last_token)
            self.tell_late(list(self.blocks), width=1, dim=4)


def _labelled(class_labels: Tensor | None, rows: Tensor) -> Tensor:
    """Rows with the label, a number or a vector, before them."""
    if class_labels is None:
        return rows
    labels = class_labels.to(rows)
    return torch.cat([labels if labels.ndim == 2 else labels[:, None], rows], dim=-1)


def _widen_labels(model: Any, late: bool, guided: bool) -> None:
    """Have a U-Net's class embedding take rows.

    Raises:
        ValueError: its labels are embedded as times are.
    """
    if model.config["class_embed_type"] not in (None, "projection", "simple_projection", "identity"):
        kind = f"class_embed_type={model.config['class_embed_type']!r}"
        raise ValueError(f"a {type(model).__mro__[3].__name__} with {kind} has no room for a second time")
    if model.config.get("class_embeddings_concat"):
        raise ValueError("a UNet2DConditionModel with class_embeddings_concat has no room for a second time")
    label = model.class_embedding
    model.class_embedding = LabelAndTimes(label, model.time_proj, model.time_embedding, late, guided)
    if not late:
        return
    width = model.time_embedding.linear_2.out_features
    model.time_embedding.register_forward_hook(with_room)
    for k, block in enumerate([*model.down_blocks, model.mid_block, *model.up_blocks]):
        if block is not None:
            is_last = k > len(model.down_blocks)
            block.register_forward_pre_hook(functools.partial(hear, width=width, dim=2, late=is_last), with_kwargs=True)

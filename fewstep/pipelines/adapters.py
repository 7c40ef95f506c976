"""Adapters (LoRA) in a pipeline that carries its code: whatever files the pipeline of its base reads, and beside those
of a few-step adapter the small file of its second time.

It is part of the ``pipeline.py`` of an export, so it needs torch and diffusers alone, and peft to load an adapter.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from .stock_prompts import stock_pipeline

# Beside an adapter's own file: the weights of what a network of two times has more than its base, by their names.
SECOND_TIME = "second_time.safetensors"


class Adapters:
    """What a pipeline with a ``network`` does with adapters, by the names that diffusers' pipelines have for it."""

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **options: Any) -> None:
        """Load an adapter: of the pipeline of the base (a style), or a few-step one that was trained as this network.

        Args:
            source: a folder or file, or the weights themselves. In a folder ``second_time.safetensors`` takes the
                place of the second time's weights, wholly and whatever strength the adapter is set to.
            adapter_name: by which ``set_adapters`` calls it.
            options: those of the base pipeline's, such as ``weight_name``.
        """
        folder = Path(source) / options.get("subfolder", "") if isinstance(source, str | Path) else Path()
        second = load_file(folder / SECOND_TIME) if (folder / SECOND_TIME).is_file() else {}
        pipe: Any = self
        own = pipe.network.state_dict()
        if wrong := [name for name in second if name not in own or own[name].shape != second[name].shape]:
            raise ValueError(f"{folder / SECOND_TIME} is of another network: this one has no such {wrong[0]}")
        self._stock().load_lora_weights(source, adapter_name=adapter_name, **options)
        if second:
            vars(self).setdefault("_before", {name: own[name].clone() for name in second})
            pipe.network.load_state_dict(second, strict=False)

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: Any = None) -> None:
        """Which adapters act, and how strongly: 1 each, if not given."""
        self._stock().set_adapters(adapter_names, adapter_weights)

    def unload_lora_weights(self) -> None:
        """The network as it was before any adapter."""
        pipe: Any = self
        self._stock().unload_lora_weights()
        pipe.network.load_state_dict(vars(self).pop("_before", {}), strict=False)

    def _stock(self) -> Any:
        """The pipeline of the base around the parts of this one, which reads adapters into them."""
        pipe: Any = self
        name = (pipe.config["text"] or {}).get("pipeline")
        if name is None:
            raise ValueError("this pipeline has no text encoders, and does not know for which its adapters are made")
        return stock_pipeline(name, pipe.components)

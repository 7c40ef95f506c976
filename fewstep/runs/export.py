"""Models and runs to disk, as others load them: export, and what an export says of its run."""

from dataclasses import replace
from pathlib import Path

from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.models.adapter_files import save_adapter
from fewstep.models.export import no_pipeline, write_field, write_plain, writer_of
from fewstep.models.lora import has_lora, merge_lora
from fewstep.models.model_card import card
from fewstep.models.writing import aside, check_target
from fewstep.runs.loading import load, open_run
from fewstep.runs.provenance import citation, origin_of
from fewstep.training.run_files import is_run


def export(
    model: FlowMap | VelocityField | str | Path,
    folder: str | Path,
    *,
    overwrite: bool = False,
    method: str | None = None,
    quality: str | None = None,
    adapter: bool = False,
    keys: str | None = None,
    trust: bool = False,
) -> Path:
    """Write a model as a folder, and return the folder.

    * A flow map of a model of diffusers: a diffusers pipeline that carries its own code,
      ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``.
    * A velocity field of one: the stock model and scheduler, as a stock pipeline where one of diffusers can run it; the
      model card says where none can.
    * One of an ``MLP`` or of a network of one's own: weights and a configuration for :func:`fewstep.load`. A network of
      one's own is named by its class; where that is a file, the file is in the export, and runs with ``trust=True``
      alone.

    Those of a latent model have its VAE, those of a model of text its tokenizers and text encoders. An export of a run
    has its recipe and images in ``training/``; ``fewstep.json`` marks each as fewstep's own. :func:`fewstep.load`
    reads each of them. The folder appears whole or not at all.

    Args:
        model: the model, or the folder of a run or of anything else that ``fewstep.load`` takes.
        overwrite: whether an export that is there already is replaced; nothing else is.
        method: the objective it was trained by, for the model card; a run knows its own.
        quality: a Markdown table for the model card; a run that has been evaluated knows its own.
        adapter: write the adapter of a LoRA alone (``fewstep.save_adapter``), not the model that it is
            added to.
        keys: of the adapter's weights, see ``fewstep.save_adapter``.
        trust: as for :func:`fewstep.load`.

    Raises:
        ValueError: a model that cannot be exported, or ``folder`` is something else than an export, or one that the
            run starts from.
        FileNotFoundError: the VAE or a text encoder of the model is gone.
        FileExistsError: there is an export already, and overwrite is not set.

    >>> fewstep.export(student, "fast-pipeline", method="ITVM")
    """
    folder = Path(folder).expanduser().resolve()
    check_target(folder, overwrite, model)
    if adapter:
        model = open_run(model, trust=trust).model if isinstance(model, str | Path) else model
        with aside(folder, model) as part:
            save_adapter(model, part, keys)  # pyright: ignore[reportArgumentType]
        return folder
    run = None
    if isinstance(model, str | Path):
        run = Path(model).expanduser() if is_run(Path(model).expanduser()) else None
        model = load(model, trust=trust)
    if has_lora(model):
        model = merge_lora(model)
    write = writer_of(model)
    with aside(folder, model) as part:
        code = (write(model, part) or "").replace("{name}", folder.name)
        origin = origin_of(model, run, part)  # pyright: ignore[reportArgumentType]
        origin = replace(origin, method=method or origin.method, quality=quality or origin.quality)
        if method and not origin.citation:
            origin = replace(origin, citation=citation(method))
        reason = no_pipeline(model) if write is write_field else ""  # pyright: ignore[reportArgumentType]
        if not (part / "model_index.json").is_file() and not reason and write is not write_plain:
            reason = "the one that it came from is not known"
        (part / "README.md").write_text(card(model, folder.name, origin, reason, code))
    return folder

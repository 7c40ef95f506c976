"""What several families are told: the names of conditions, and the shape of one row of each."""

from typing import Any


def label_shape(model: Any) -> dict[str, tuple[int, ...]]:
    """The row of ``class_labels`` of a U-Net that needs them: the number of a class, a time, or a vector."""
    config = model.config
    match config["class_embed_type"]:
        case None:
            return {} if config["num_class_embeds"] is None else {"class_labels": ()}
        case "projection" | "simple_projection":
            return {"class_labels": (config["projection_class_embeddings_input_dim"],)}
        case "identity":
            return {"class_labels": (model.time_embedding.linear_2.out_features,)}
        case _:
            return {"class_labels": ()}


def text_and_pooled(model: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    """What the models of joint attention are told of a prompt: its tokens, and a vector of it all."""
    config = model.config
    text, pooled = (tokens, config["joint_attention_dim"]), (config["pooled_projection_dim"],)
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def own_guidance(model: Any) -> dict[str, tuple[int, ...]]:
    """The row of ``guidance`` of a model that was distilled to be told its strength."""
    return {"guidance": ()} if model.config["guidance_embeds"] else {}

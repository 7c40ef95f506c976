"""The flags of `sample` that steer, and what is said of it."""

import argparse
from typing import Any


def add_steering(p: argparse.ArgumentParser) -> None:
    text = "steer by a reward of your own, a function of images (N, C, H, W) in [-1, 1] that gives (N,), in nats"
    p.add_argument("--steer", metavar="FILE.py:NAME", help=text)
    text = "with --steer, how many each sample is one of, drawn by weight (default: 16)"
    p.add_argument("--particles", type=int, metavar="N", help=text)
    text = "with --steer, a factor of the reward (default: 1)"
    p.add_argument("--strength", type=float, metavar="S", help=text)
    p.add_argument("--steer-gradient", action="store_true", help="with --steer, follow the reward's gradient too")


def steered_by(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """What steers, if anything does, and all that it hangs on, in words for files."""
    from fewstep.generation.steered import Steered, contents, load_reward

    if args.steer is None:
        for flag in ("particles", "strength", "steer_gradient"):
            value = getattr(args, flag)
            if value is not None and value is not False:
                raise ValueError(f"--{flag.replace('_', '-')} belongs to --steer FILE.py:NAME, which names a reward")
        return None, {}
    for flag, value in (("--solver", args.solver), ("--last-step", args.last_step)):
        if value is not None:
            raise ValueError(f"{flag} {value}: steering takes steps of its own, with noise in them; leave it out")
    if args.grid == "optimal":
        raise ValueError(
            "--grid optimal is found for samples that are not steered; leave out one of --grid and --steer"
        )
    strength = 1.0 if args.strength is None else args.strength
    reward = load_reward(args.steer, strength, args.steer_gradient)
    steered = Steered(reward, 16 if args.particles is None else args.particles)
    how = {"steer": args.steer.rpartition("/")[2], "particles": steered.particles, "strength": strength}
    return steered, {**how, "gradient": args.steer_gradient, "reward": contents(args.steer)}


def became(particles: int, least: float, left: float) -> str:
    """What became of populations, and what to do about it."""
    from fewstep.generation.steered import FEW

    said = f"each is one of {particles}: {least:.1f} of them effective at the least, {left:.1f} ancestors left (means)"
    return said if least >= FEW else f"{said}. So few: lower --strength, raise --particles, or take --steer-gradient"

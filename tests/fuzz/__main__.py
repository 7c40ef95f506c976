import argparse
import gc
import json
import os
import pkgutil
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases, to look at")
    parser.add_argument("--faults", type=Path, help="a file for what went wrong, a line of JSON each")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    # All that a command would import is here before the processes part.
    for module in ("fewstep", "matplotlib.pyplot", "ot", "scipy.linalg", "transformers", "sklearn", "rich.progress"):
        import_module(module)
    import fewstep

    for found in pkgutil.walk_packages(fewstep.__path__, "fewstep."):
        if not found.name.endswith("__main__"):
            import_module(found.name)
    from fuzz import bounds, cases, world

    world.settle()
    with tempfile.TemporaryDirectory(prefix="fewstep-world-", dir=bounds.SCRATCH) as place:
        os.environ["FEWSTEP_CACHE"] = f"{place}/cache"
        world.build(Path(place))
        drawn = cases.cases(Path(place), args.count, args.seed)
        chosen = range(len(drawn)) if args.only is None else args.only
        gc.collect()
        gc.freeze()
        start, faults = time.monotonic(), []
        for number, fault in bounds.run_all([drawn[i] for i in chosen], Path(place), args.jobs):
            if args.only is not None:
                print(
                    f"{cases.shown(drawn[chosen[number]])}\n{fault.kind if fault else 'good'}\n{fault and fault.said}\n"
                )
            if fault is not None:
                faults.append((chosen[number], fault))
        if args.faults is not None:
            lines = [{"case": i, "kind": f.kind, "is": cases.shown(drawn[i]), "said": f.said} for i, f in faults]
            args.faults.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind, count in Counter(fault.kind for _, fault in faults).most_common():
        first = next(i for i, fault in faults if fault.kind == kind)
        print(f"{count:5} {kind} (such as {first})")
    print(f"{len(chosen)} cases, {len(faults)} faults, {time.monotonic() - start:.0f} s")
    return 1 if faults else 0


sys.exit(main())

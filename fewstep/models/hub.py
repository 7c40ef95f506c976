"""Exports on the Hugging Face hub: looked through first, then uploaded whole."""

import re
import zipfile
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

from fewstep.common.model_files import read_json
from fewstep.common.received import unlike_its_name
from fewstep.models.adapter_files import DIFFUSERS_FILE, PEFT_CONFIG
from fewstep.training.run_files import is_run

# Names that files with secrets have, and their folders. "token" alone would catch tokenizers.
_SECRETS = (
    ".env", ".env.*", "*.env", ".netrc", ".git-credentials", ".npmrc", ".pypirc", ".htpasswd", "*.pem", "*.key",
    "*.p12", "*.pfx", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "credentials", "credentials.*",
    "secret", "secret.*", "secrets", "secrets.*", "*_token", "*_token.txt", "token", "token.txt",
    ".ssh", ".aws", ".gnupg", ".azure", ".kube",
)  # fmt: skip
# What they have in them: tokens of the hub and of others, and private keys.
_SECRET_TEXT = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{32,}|\bgh[opsur]_[A-Za-z0-9]{36}|\bgithub_pat_\w{22,}"
    rb"|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_READ = 1 << 20  # bytes of a file that are looked at, at its start and at its end
_PICKLES = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".ckpt", ".bin", ".dill")
# Left behind by tools, of use to nobody.
_LEFT_OUT = (".git", ".cache", "__pycache__", ".DS_Store", "*.pyc", ".gitignore", "*~", "*.swp")


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload an export (or an adapter, a converted model, a program) to the Hugging Face hub; returns its address.

    The repository is made where there is none. Files of the folder replace those of the same name there, in one
    commit; others stay.

    Args:
        folder: what ``fewstep export`` or ``fewstep convert`` wrote.
        name: owner/name of the repository.
        private: of a new repository; the owner's default if not given.
        message: of the commit.
        token: one that may write; that of ``hf auth login`` or of HF_TOKEN if not given.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no export, a run, a file that is a pickle or may hold a secret, a name without an owner, or a public
            repository where a private one is asked for.
        PermissionError: the hub does not know who you are, or you may not write there.
        ConnectionError: it cannot be reached.

    >>> fewstep.push("fast-pipeline", "me/fast-pipeline", private=True)
    'https://huggingface.co/me/fast-pipeline'
    """
    folder = Path(folder).expanduser()
    check_folder(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name!r} names no repository of the hub: owner/name is needed, such as me/{folder.name}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi(token=token)
    try:
        url = str(hub.create_repo(name, private=private, exist_ok=True))
        if private and not hub.repo_info(name).private:
            raise ValueError(f"{name} is there already and is public: make it private on its page, or name another")
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message or f"Upload {folder.resolve().name} with fewstep",
            allow_patterns=[escape(file.relative_to(folder).as_posix()) for file in uploaded(folder)],
        )
    except HfHubHTTPError as error:
        raise _refused(name, error) from error
    except Exception as error:
        # What the hub's library has for connections that fail, whichever it is built on.
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        reason = str(error).strip().split("\n")[0]
        raise ConnectionError(f"the Hugging Face hub cannot be reached, and nothing is uploaded ({reason})") from error
    return url


def _refused(name: str, error: Exception) -> OSError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return PermissionError("the Hugging Face hub does not know who you are: hf auth login, or set HF_TOKEN")
    if status in (403, 404):
        return PermissionError(
            f"this account may not write to {name} on the Hugging Face hub: a token with the right to write is needed, "
            f"and the owner {name.partition('/')[0]} must be yours"
        )
    return ConnectionError(f"the Hugging Face hub did not take {name} ({str(error).strip().splitlines()[0]})")


def kind_of(folder: Path) -> str:
    """What an export is: pipeline (with code of its own), model, program, plain (for fewstep alone) or adapter; empty
    for a folder that is none."""
    index, config = read_json(folder / "model_index.json"), read_json(folder / "config.json")
    if index:
        has_code = isinstance(index.get("_class_name"), list)
        return "pipeline" if has_code else "model"
    if config.get("_class_name") == "FlowMapProgram":
        return "program"
    if "_fewstep_version" in config:
        return "plain"
    if (folder / PEFT_CONFIG).is_file() or (folder / DIFFUSERS_FILE).is_file():
        return "adapter"
    return "model" if any((folder / part / "config.json").is_file() for part in ("unet", "transformer")) else ""


def check_folder(folder: Path) -> None:
    """That a folder is an export, with nothing in it that should not be published.

    Raises:
        FileNotFoundError, ValueError: as :func:`push`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if is_run(folder):
        raise ValueError(f"{folder} is a run, and what is pushed is a model: fewstep export {folder} FOLDER first")
    if not kind_of(folder):
        raise ValueError(f"{folder} is no export: fewstep export writes one, fewstep convert too")
    for file in uploaded(folder):
        path = file.relative_to(folder)
        if file.is_symlink() and (where := _leads(file, folder)):
            raise ValueError(f"{path} is a link {where}: only files that lie in the folder are uploaded, remove it")
        if why := _secret(file, path):
            raise ValueError(f"{path} in {folder} {why}, and nothing is uploaded: remove it")
        if _is_pickle(file):
            raise ValueError(
                f"{path} in {folder} is a pickle, which can run any code where it is loaded: remove it, weights belong "
                "in safetensors"
            )
        if why := _unlike(file):
            raise ValueError(f"{path} in {folder} {why}, and nothing is uploaded: put the file itself there")


def uploaded(folder: Path) -> list[Path]:
    """The files of a folder that are uploaded, and all links, which :func:`check_folder` looks at."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_symlink() or not file.is_dir())
    return [f for f in files if not any(fnmatch(p, left) for p in f.relative_to(folder).parts for left in _LEFT_OUT)]


def _leads(link: Path, folder: Path) -> str:
    """Where a link leads, if not to a file of the folder."""
    if not link.exists():
        return "to nothing"
    if not link.resolve().is_relative_to(folder.resolve()):
        return f"out of {folder}"
    return "to a folder" if link.is_dir() else ""


def _secret(file: Path, path: Path) -> str:
    """Why a file may hold a secret; empty where nothing says so."""
    if any(fnmatch(part.lower(), name) for part in path.parts for name in _SECRETS):
        return "has the name of a file with secrets"
    with file.open("rb") as content:
        start = content.read(_READ)
        # An image may be followed by anything; the weights of a model fill what is between.
        content.seek(max(0, file.stat().st_size - _READ))
        found = _SECRET_TEXT.search(start) or _SECRET_TEXT.search(content.read())
        return "has what looks like a token or a key in it" if found else ""


def _unlike(file: Path) -> str:
    """Why a file is not what it seems to be; empty where it is."""
    if file.stat().st_nlink > 1:
        return "has another name on this disk (a hard link)"
    return unlike_its_name(file, file.suffix)


def _is_pickle(file: Path) -> bool:
    with file.open("rb") as content:
        start = content.read(2)
    if file.suffix.lower() in _PICKLES or (start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return True
    # torch.save makes archives with a pickle in them, as whatever they may be called; an exported program is one too,
    # of its own making.
    if start != b"PK" or file.suffix == ".pt2" or not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith(".pkl") for name in archive.namelist())


def how_to_load(name: str, kind: str) -> str:
    """One line of Python, or a command, that gets what was pushed."""
    if kind in ("pipeline", "model"):
        trust = ", trust_remote_code=True" if kind == "pipeline" else ""
        return f'diffusers.DiffusionPipeline.from_pretrained("{name}"{trust})'
    if kind == "plain":
        return f'fewstep.load("{name}")'
    return f"hf download {name} --local-dir {name.partition('/')[2]}"

"""Pretrained weights by name, from the Hugging Face Hub: `--init-weights timm:NAME` and `--init-weights hf:OWNER/NAME`.

A file is downloaded once into the cache of huggingface_hub (~/.cache/huggingface) and works without a network from then
on. Only the tensors are used: the network comes from `model.architecture`.
"""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import SettingsError
from common.text import first_line
from models.published.timm_models import hub_repository

TIMM, HUB = "timm:", "hf:"
FILES = ("model.safetensors", "weights.safetensors", "pytorch_model.bin")  # the first that the repository has


def is_name(source: str) -> bool:
    """Whether the weights are named, not given as a file."""
    return source.startswith((TIMM, HUB))


def recorded_name(source: str) -> str:
    """Return what run.json records: the name, or the file without its folders."""
    return source if is_name(source) else Path(source).name


def local_file(source: str) -> Path:
    """Return the file of the weights, after downloading it where it is named and not in the cache.

    Raises:
        SettingsError: there is no such file, model or repository, or no network.
    """
    if not is_name(source):
        path = Path(os.path.expanduser(source))  # shells leave ~ alone in --init-weights=~/w.safetensors
        if not path.is_file():
            raise SettingsError(f"--init-weights {source}: there is no such file; check the path")
        return path
    if source.startswith(TIMM):
        return download(hub_repository(source.removeprefix(TIMM)), source)
    return download(source.removeprefix(HUB), source)


def download(repository: str, source: str) -> Path:
    """Return a file of a repository `owner/name` in the cache. Raises SettingsError, which names `source`."""
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise SettingsError(
            f"--init-weights {source} needs huggingface_hub, which cannot be imported ({error}): "
            "pip install huggingface_hub"
        ) from error
    page, is_offline = f"https://huggingface.co/{repository}", False
    for name in FILES:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name))
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
            is_offline = True
        except errors.EntryNotFoundError:
            pass  # the repository has no such file
        except errors.GatedRepoError as error:
            raise SettingsError(
                f"--init-weights {source}: accept the terms at {page}, then log in: hf auth login"
            ) from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise SettingsError(
                f"--init-weights {source}: the Hugging Face Hub has no public repository '{repository}'; "
                "check the name, as in hf:timm/vit_base_patch32_224.augreg_in21k_ft_in1k"
            ) from error
        except (errors.HfHubHTTPError, OSError) as error:
            raise SettingsError(
                f"--init-weights {source} cannot be downloaded ({first_line(error)}); try again"
            ) from error
    if is_offline:
        problem, cure = "the Hugging Face Hub cannot be reached", "with a network"
        if constants.HF_HUB_OFFLINE:
            problem, cure = "HF_HUB_OFFLINE=1 forbids the download", "with HF_HUB_OFFLINE=0 and a network"
        raise SettingsError(
            f"--init-weights {source} is not in the cache and {problem}; run the command once {cure}, "
            f"or download {FILES[0]} from {page} and give its path"
        )
    raise SettingsError(f"--init-weights {source}: {page} has none of {', '.join(FILES)}; give the path of a file")

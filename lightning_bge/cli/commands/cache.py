"""`lightning-bge cache list | clear`: what is kept for later runs."""

from collections import Counter
from pathlib import Path

from lightning_bge.cli.arguments import PlainParser
from lightning_bge.data.tokens.cache_folder import DAY, TOKENS, UNFINISHED, cached_files, clear_cache
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.cache_dir import default_cache_dir
from lightning_bge.runtime.paths import check_path
from lightning_bge.runtime.units import format_bytes

DESCRIPTION = """List the files of the cache with size and age, or delete them: tokenized texts, which are tokenized
again where they are needed, and micro-batch sizes, which are then searched again. data.cache_gb limits the cache."""


def run(args: list[str]) -> None:
    """Print the files, or delete them and print what that frees."""
    parser = PlainParser(prog="lightning-bge cache", description=DESCRIPTION)
    parser.add_argument("action", choices=("list", "clear"), help="Whether to list the files or to delete them.")
    parser.add_argument(
        "--cache_dir",
        type=Path,
        help="Folder of the cache. Unset: the environment variable LIGHTNING_BGE_CACHE, else ~/.cache/lightning-bge.",
    )
    parser.add_argument(
        "--older_than",
        type=float,
        metavar="DAYS",
        help="With clear: delete only files not used for so many days. Unset: 1, as a run may still need younger ones; "
        "0 deletes all.",
    )
    chosen = parser.parse_args(args)
    if chosen.cache_dir is not None:
        check_path("--cache_dir", chosen.cache_dir)
    folder = default_cache_dir() if chosen.cache_dir is None else chosen.cache_dir.expanduser()
    days = chosen.older_than
    if days is not None and (chosen.action == "list" or not days >= 0):
        raise ConfigError(f"--older_than: expected a number of days from 0 up, for clear, got {days:g}")
    if not folder.is_dir():
        if folder.exists() or chosen.cache_dir is not None:
            raise ConfigError(f"--cache_dir: expected the folder of a cache, got {folder}")
        print(f"{folder}: nothing is cached, the folder does not exist yet")
    elif chosen.action == "list":
        print(describe_cache(folder))
    else:
        before = len(cached_files(folder))
        freed = clear_cache(folder, 1.0 if days is None else days)
        left = cached_files(folder)
        kept = "; --older_than 0 deletes those of the last day too" if left and days is None else ""
        print(f"{folder}: {_count(before - len(left))} deleted, {format_bytes(freed)}; {_count(len(left))} left{kept}")


def describe_cache(folder: Path) -> str:
    """The folder, each file of tokenized texts with size and age, and a total for each kind of file."""
    files = cached_files(folder)
    lines = [
        f"{format_bytes(file.size):>12}  {_age(file.age)}  {file.path.stem[:16]}..{file.path.suffix}"
        for file in files
        if file.kind == TOKENS
    ]
    sizes, counts = Counter[str](), Counter(file.kind for file in files)
    for file in files:
        sizes[file.kind] += file.size
    for kind, count in counts.items():
        youngest = min(file.age for file in files if file.kind == kind)
        used = f"last used {_age(youngest).strip()}"
        note = "deleted by clear once they are a day old" if kind == UNFINISHED else used
        lines.append(f"{kind}: {_count(count)}, {format_bytes(sizes[kind])}, {note}")
    total = f"total: {_count(len(files))}, {format_bytes(sum(sizes.values()))}"
    return "\n".join([str(folder), *lines, total])


def _age(seconds: float) -> str:
    for unit, length in (("days", DAY), ("hours", 3600.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:>5.0f} {unit} ago"
    return f"{seconds / 60:>5.0f} minutes ago"


def _count(number: int) -> str:
    return f"{number:,} file{'s' * (number != 1)}"

"""The command `loraplex`. Commands import what they need when they run: `--help` stays quick."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from .cli_adapters import adapters_app
from .cli_options import Assignments, Config, Key, Url, connect, load_settings
from .cli_simulate import simulate_command
from .cli_store import store_app
from .cli_tenants import tenants_app

app = typer.Typer(
    name="loraplex",
    help="Serve many tenants' LoRA adapters over one shared Mixture-of-Experts model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(adapters_app, name="adapters")
app.add_typer(store_app, name="store")
app.add_typer(tenants_app, name="tenants")
app.command("simulate")(simulate_command)

Host = Annotated[
    str | None,
    typer.Option(help="Address of the REST API [LORAPLEX_HOST; 127.0.0.1]", show_default=False),
]
Port = Annotated[
    int | None,
    typer.Option(help="Its port, 0: any free one [LORAPLEX_PORT; 8000]", show_default=False),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="What outlives the run [LORAPLEX_DATA_DIR; .loraplex]",
        show_default=False,
    ),
]
Groups = Annotated[
    int | None,
    typer.Option(help="Worker groups, each a copy of the model [LORAPLEX_GROUPS; 2]"),
]
TensorParallel = Annotated[
    int | None, typer.Option("--tp", help="Ranks in a group [LORAPLEX_TP; 1]")
]
ExpertParallel = Annotated[
    int | None,
    typer.Option(
        "--ep", help="Parts that the experts are split into; divides --tp [LORAPLEX_EP; 1]"
    ),
]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu or cuda [LORAPLEX_DEVICE; auto: a GPU if any]")
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Every setting can also come from --set, the environment (LORAPLEX_<NAME>) or a file."""


@app.command()
def up(
    host: Host = None,
    port: Port = None,
    data_dir: DataFolder = None,
    demo_dir: Annotated[
        Path | None,
        typer.Option(help="The demo's files [LORAPLEX_DEMO_DIR; deploy/demo]", show_default=False),
    ] = None,
    groups: Groups = None,
    tp: TensorParallel = None,
    ep: ExpertParallel = None,
    device: Device = None,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Start everything on this machine, with the demo model and three demo tenants."""
    from .up import up as run

    settings = load_settings(
        config,
        assignments,
        host=host,
        port=port,
        data_dir=data_dir,
        demo_dir=demo_dir,
        groups=groups,
        tp=tp,
        ep=ep,
        device=device,
    )
    run(settings, Console(file=sys.stdout))


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a Hugging Face model, s3://bucket/prefix, or a repository in the "
            "Hugging Face cache (org/name, org/name@revision) [LORAPLEX_MODEL_PATH]",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="s3://bucket/prefix [LORAPLEX_STORE_URL; an embedded store in the data folder]. "
            "Other than AWS: LORAPLEX_STORE_ENDPOINT",
            show_default=False,
        ),
    ] = None,
    load_format: Annotated[
        str | None,
        typer.Option(
            help="auto, or dummy: random weights, to measure with a config.json and a tokenizer "
            "alone [LORAPLEX_LOAD_FORMAT; auto]",
            show_default=False,
        ),
    ] = None,
    tp: TensorParallel = None,
    ep: ExpertParallel = None,
    groups: Groups = None,
    device: Device = None,
    host: Host = None,
    port: Port = None,
    data_dir: DataFolder = None,
    name: Annotated[
        str | None,
        typer.Option(help="What requests call the base model [its folder's name]"),
    ] = None,
    rotate_admin_key: Annotated[
        bool, typer.Option("--rotate-admin-key", help="Make a new admin key, end the old one.")
    ] = False,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Serve your own model from this machine."""
    from .up import serve as run

    settings = load_settings(
        config,
        assignments,
        model_path=model,
        load_format=load_format,
        store_url=store,
        tp=tp,
        ep=ep,
        groups=groups,
        device=device,
        host=host,
        port=port,
        data_dir=data_dir,
        served_model_name=name,
    )
    run(settings, Console(file=sys.stdout), rotate_admin_key)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option("--model", help="As for serve [LORAPLEX_MODEL_PATH]")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", help="As for serve [LORAPLEX_STORE_URL]")
    ] = None,
    data_dir: DataFolder = None,
    as_json: Json = False,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Check this machine, its GPUs, the object store and the model; exit code 1 if one fails."""
    from .cli_doctor import show_examination

    settings = load_settings(
        config, assignments, model_path=model, store_url=store, data_dir=data_dir
    )
    raise typer.Exit(0 if show_examination(settings, as_json) else 1)


@app.command("config")
def show_config(
    names: Annotated[
        list[str] | None, typer.Argument(help="Only these settings", show_default=False)
    ] = None,
    as_json: Json = False,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Show the settings that would be used, and where each comes from; secrets are hidden."""
    from .cli_config import show_settings

    show_settings(names or [], as_json, config, assignments or [])


@app.command()
def status(url: Url = None, key: Key = None) -> None:
    """Show groups, their load and where adapters are (admin key)."""
    from .cli_status import show_status

    with connect(url, key) as client:
        show_status(client, Console())


def main() -> None:
    """Runs a command. Errors that a user can cause are one message on stderr, exit code 1."""
    # Looked for here as well, so that it may stand anywhere on the line.
    debug = "--debug" in sys.argv
    if debug:
        sys.argv = [sys.argv[0], "--debug", *(a for a in sys.argv[1:] if a != "--debug")]
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _fail(_explain(error), debug)


def _explain(error: Exception) -> str:
    from ..adapter_store import AdapterStoreError
    from .errors import ClusterError

    if isinstance(error, (ClusterError, AdapterStoreError)):
        return str(error)
    if isinstance(error, MemoryError):
        return "the machine has no memory left. Stop other programs, or use fewer --groups"
    return f"unexpected {type(error).__name__}: {error}. --debug shows where"


def _fail(message: str, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]error:[/bold red] {escape(message)}")
    sys.exit(1)


if __name__ == "__main__":
    main()

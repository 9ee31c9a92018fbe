"""The command line: `mistudio serve`, `demo`, `mcp`, `engine`, `doctor`, and one subcommand per operation.

Commands import what they need when they run, so that `mistudio --help` is instant. A subcommand of an operation is made
from the catalogue; this file knows none of them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from mistudio_engine import __version__

__all__ = ["main"]

HOME = click.option("--home", type=click.Path(path_type=Path), help="Data directory [default: MISTUDIO_HOME].")


class Commands(click.Group):
    """The fixed commands, then a command for each operation, made when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *(name.replace("_", "-") for name in self._operations())]

    def _operations(self) -> dict[str, str]:
        """Those that have no command of their own."""
        return {name: text for name, text in _catalogue().items() if name not in self.commands}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is not None or cmd_name.replace("-", "_") not in _catalogue():
            return command
        from mistudio_engine.server.cli_operations import command_of

        return command_of(cmd_name.replace("-", "_"))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        fixed = [(name, command.get_short_help_str(90)) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(fixed)
        with formatter.section("Operations"):
            formatter.write_dl([(name.replace("_", "-"), text) for name, text in self._operations().items()])


def _catalogue() -> dict[str, str]:
    """Every operation with its summary, without importing any."""
    lines = (Path(__file__).parents[1] / "api" / "catalogue.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="mistudio")
def cli() -> None:
    """A workbench for sparse autoencoders: one engine for agents, notebooks and programs."""


@cli.command()
@HOME
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=0, help="Port; 0 takes a free one.")
@click.option("--allow-remote", is_flag=True, help="Listen beyond loopback. Everyone who has the token can use it.")
@click.option("--log-level", default="warning", type=click.Choice(["debug", "info", "warning", "error"]))
def serve(home: Path | None, host: str, port: int, allow_remote: bool, log_level: str) -> None:
    """Run the engine in the foreground."""
    from mistudio_engine.server.serve import run

    run(home, host=host, port=port, allow_remote=allow_remote, log_level=log_level)


@cli.command()
@HOME
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
@click.option("--keep", is_flag=True, help="Leave the engine running.")
@click.option("--model", default="embedded", show_default=True, help="Folder or hub id of a language model.")
@click.option("--text", default=None, help="File or hub id of a dataset [default: the embedded corpus].")
@click.option("--hook", "hook_name", default=None, help="Hook to train on, such as blocks.2.hook_resid_post.")
@click.option("--seed", default=0, show_default=True)
def demo(**options: Any) -> None:
    """The whole path in about a minute: train an SAE, find its features, steer with one, export."""
    from mistudio_engine.server.demo import run

    run(**options)


@cli.group(invoke_without_command=True)
@HOME
@click.option(
    "--profile",
    type=click.Choice(["research", "full"]),
    default="research",
    show_default=True,
    envvar="MISTUDIO_MCP_PROFILE",
    help="Which tools: those that most work needs, or all.",
)
@click.pass_context
def mcp(ctx: click.Context, home: Path | None, profile: str) -> None:
    """Serve MCP over stdio, for an agent's configuration; `mcp install CLIENT` writes that."""
    if ctx.invoked_subcommand is None:
        from mistudio_mcp.__main__ import run

        run(home, profile)  # type: ignore[arg-type]  one of the two


@mcp.command("install")
@click.argument("client", type=click.Choice(["claude-code", "claude-desktop", "cursor", "vscode"]))
@click.option("--path", type=click.Path(path_type=Path), help="Configuration file to write instead of the usual one.")
@click.option("--dry-run", is_flag=True, help="Only show what would be written.")
@HOME
def mcp_install(client: str, path: Path | None, dry_run: bool, home: Path | None) -> None:
    """Add miStudio to the configuration of an agent's program; other entries stay as they are."""
    from mistudio_mcp.install import install

    click.echo(install(client, path=path, home=home, dry_run=dry_run))


@cli.group()
def engine() -> None:
    """Start, stop and look at the engine."""


@engine.command("start")
@HOME
def engine_start(home: Path | None) -> None:
    """Start the engine in the background, or find the one that runs."""
    from mistudio_engine.api.home import ensure_engine

    found = ensure_engine(home)
    click.echo(f"engine {found.version} at {found.url}, pid {found.pid}")


@engine.command("stop")
@HOME
def engine_stop(home: Path | None) -> None:
    """Stop the engine; running jobs write a checkpoint first and go on at the next start."""
    from mistudio_engine.server.serve import stop

    click.echo(stop(home))


@engine.command("status")
@HOME
def engine_status(home: Path | None) -> None:
    """Say whether an engine runs, and where."""
    from mistudio_engine.api.home import data_dir, probe

    found = probe(home)
    if found is None:
        click.echo(f"no engine runs on {data_dir(home)}")
        sys.exit(3)
    click.echo(f"engine {found.version} at {found.url}, pid {found.pid}, data in {data_dir(home)}")


@engine.command("logs")
@HOME
@click.option("-n", "n_lines", default=50, show_default=True, help="Last lines.")
def engine_logs(home: Path | None, n_lines: int) -> None:
    """Show the end of the engine's log."""
    from mistudio_engine.api.home import log_path, tail

    click.echo(tail(log_path(home), n_lines) or f"{log_path(home)} is empty")


@cli.command()
@HOME
def doctor(home: Path | None) -> None:
    """Check the installation: packages, device, disk, embedder, JupyterLab extension, engine."""
    from mistudio_engine.server.doctor import checks

    findings = list(checks(home))
    for finding in findings:
        click.echo(f"{finding.mark} {finding.name:<20} {finding.text}")
    sys.exit(1 if any(finding.fatal for finding in findings) else 0)


@cli.command()
@click.argument("ref")
@click.option("--name", default=None, help="Slug of the new training [default: NAME-again].")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@HOME
def reproduce(ref: str, name: str | None, as_json: bool, home: Path | None) -> None:
    """Make training/NAME or sae/NAME again and compare the weights; the status is 1 when they differ."""
    from mistudio_engine.api.client import connect

    with connect(home) as studio:
        result = studio.reproduce(ref=ref, name=name).wait()
    click.echo(result.model_dump_json(indent=2) if as_json else result.summary)
    sys.exit(0 if result.identical else 1)


def main(arguments: list[str] | None = None) -> None:
    """The console script; errors of ours are shown as what, why and what to do, without a trace."""
    from mistudio_engine.api.errors import MistudioError
    from mistudio_engine.api.home import EXIT_BUSY

    try:
        cli.main(args=arguments, prog_name="mistudio", standalone_mode=True)
    except MistudioError as error:
        if os.environ.get("MISTUDIO_JSON_ERRORS") == "1":
            click.echo(json.dumps(error.body.model_dump(mode="json")), err=True)
        else:
            for part in (f"error: {error.what}", error.why, error.fix):
                if part:
                    click.echo(part, err=True)
        sys.exit(EXIT_BUSY if error.code == "engine_busy" else 1)

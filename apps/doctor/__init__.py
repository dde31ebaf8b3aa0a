"""`tinychat doctor`: the state of this machine for tinychat, what is missing, and how to fix it.

    tinychat doctor [--quick]          text for people; exit code 1 if the chosen backend cannot run
    tinychat doctor --json             one object for programs
    tinychat doctor --report -         Markdown for a bug report, without private data

The keys of --json are stable; new ones may be added. At the top level:
    schema            1
    ok                whether the chosen backend runs
    problems          [{where: "section.key", state: "broken" or "note", what, do}], broken ones first
and one object per section, with null for unknown or absent values:
    machine           processor, system, python[, translated]
    memory            total_bytes, free_bytes (within the limits), swap_bytes, limit_bytes
    threads           threads, threads_why, logical_cpus, usable_cpus, physical_cores, cpu_quota
    native            library, instruction_sets (best first), used
    software          tinychat {version, kind, commit of a checkout}, libraries {name: version}, conflicts [distribution, …], and one
                      key per finding
    backends          chosen {name, why, wanted}; mlx, cuda, cpu, reference: {works, and device {backend, name, detail,
                      why, features}, remarks [missing features and reasons][, bandwidth], or error, do[, driver: NVIDIA's]}
    speed             read_bytes_s, int8_ops_s, expected [{model, bytes_per_token, tok_s, prompt_tok_s, fits}] (computed
                      from the others); absent with --quick
    disk              models, conversions, weights, prefixes, cubins, winners, sessions, history: {path, exists, bytes, delete};
                      free_bytes on the disk of the models
    configuration     file {path, origin, exists, settings [name, …]}, environment {variable: value, or null if it is
                      private}[, unknown_variables]
    model             model {name, origin, here[, bytes, fits_context, context]}: the default one
"""

from __future__ import annotations

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@click.option(
    "--report", metavar="FILE", help="Write Markdown for a bug report, without private data (-: stdout)."
)
@click.option("--quick", is_flag=True, help="Skip the speed measurement (two seconds).")
@click.option(
    "--backend",
    type=click.Choice(["auto", "mlx", "cuda", "cpu", "reference"]),
    help="Check this backend [the default of `tinychat chat`].",
)
def doctor(as_json: bool, report: str | None, quick: bool, backend: str | None) -> int:
    """Show the devices and software of this machine, and what is missing.

    Exit code 1: the chosen backend cannot run.
    """
    import json

    if as_json and report == "-":
        raise click.UsageError("--json and --report - both use stdout: give --report a file")
    if report not in (None, "-"):
        from tinychat_mlx.apps.doctor.report import check

        check(report)
    from tinychat_mlx.apps.doctor import view
    from tinychat_mlx.apps.doctor.examine import examine
    from tinychat_mlx.apps.doctor.finding import problems

    sections, ok = examine(backend, measure=not quick)
    if report is not None:
        from tinychat_mlx.apps.doctor.report import markdown, write

        write(report, markdown(sections, ok))
    if as_json:
        found = {"schema": 1, "ok": ok, "problems": [*problems(sections)]}
        click.echo(json.dumps(found | {s.key: s.as_json() for s in sections}, ensure_ascii=False))
    elif report is None:
        view.show(sections, ok)
    return 0 if ok else 1

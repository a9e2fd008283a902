"""`unireg convert`: transforms in the spelling of another tool."""

import argparse
import json
import os
import shutil
from pathlib import Path

from unireg_jax import manifest
from unireg_jax.errors import (
    FAILED,
    PARTLY,
    USAGE,
    UserError,
    bad_file,
    of_item,
    shown,
)
from unireg_jax.imaging import mapping, nifti
from unireg_jax.manifest import Case
from unireg_jax.verbs import files, options
from unireg_jax.verbs.journal import Journal, open_alone
from unireg_jax.verbs.messages import one_line, progress, warn, with_reason

HELP = "a transform in the spelling of another tool"

_JOURNAL = "convert.jsonl"  # beside the fields of a list: what each was made of
Work = tuple[list[str], Case, str]  # names of a field, its pair, the pair's result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "itk: composite .h5 (ITK, ANTs, Slicer), every part kept. ants, nifti1007: "
        "field in LPS mm; nifti1006: in RAS mm. l2r: Learn2Reg field in voxels. "
        "slicer: NRRD field. affine-txt: ITK text. bids: .h5 or .txt under a name "
        "such as from-MOVING_to-FIXED_mode-image_xfm.h5. The map stays the same; see "
        "`unireg invert` for the way back. With --manifest the results of all pairs of "
        "a Learn2Reg task, under the names of a submission; the same command goes on "
        "where it stopped: fields that were made of these files stay."
    )
    parser.epilog = (
        "example: unireg convert -t c_1Warp.nii.gz --to l2r -f fixed.nii.gz "
        "-m moving.nii.gz -o disp_1_2.nii.gz"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    files.add_transforms(which, one=True, required=False)
    which.add_argument(
        "--manifest",
        metavar="FILE",
        help="list of pairs, CSV, JSON or Learn2Reg's dataset.json; with --transforms",
    )
    files.add_results(parser, dest="results")
    add = parser.add_argument
    add("--to", required=True, choices=tuple(mapping.SPELLINGS), help="spelling")
    add(
        *("-f", "--fixed", "--reference"),
        dest="fixed",
        metavar="FILE",
        help="fixed scan, on whose stored grid a field is written; default: the grid "
        "of the field that acts first",
    )
    add("-m", "--moving", metavar="FILE", help="moving scan, for l2r")
    files.add_out(parser, "that of the spelling; with --manifest a folder")
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    _check_options(args)
    return _many(args) if args.manifest else _one(args)


def _check_options(args: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    fault = None
    if args.manifest and (args.fixed or args.moving):
        fault = "--fixed and --moving belong to --transform, got them with --manifest"
    elif args.manifest and not args.results:
        fault = "--manifest needs --transforms DIR, where the results are, got none"
    elif args.manifest and args.to != "l2r":
        fault = f"--to l2r expected with --manifest, got {args.to}; convert one by one"
    elif not args.manifest and (args.results or args.data_root):
        fault = "--transforms and --data-root belong to --manifest, got no list"
    if fault:
        raise UserError("schema", f"schema: {fault}", USAGE)


def _one(args: argparse.Namespace) -> int:
    mapping.spelling_of(args.file, args.to)
    inputs = (args.fixed, args.moving, *args.transforms)
    files.output(args.file, (), overwrite=args.overwrite, inputs=inputs)
    say = progress(args.quiet)
    say("reading")
    fixed, moving = files.read_grid(args.fixed), files.read_grid(args.moving)
    whole, warnings = files.read_chain(args.transforms, fixed=fixed, moving=moving)
    if args.to == "l2r" and moving is None:
        warnings.append(
            "no --moving: the field holds only if the moving scan lies on the "
            "grid of the fixed one"
        )
    for line in warnings:
        warn(line)
    say("writing")
    mapping.write(args.file, whole, args.to, fixed=fixed, moving=moving)
    say(f"done: {shown(args.file)}")
    told = [one_line(line) for line in warnings]
    files.report(args, "convert", to=args.to, warnings=told)
    return 0


# --- a submission to Learn2Reg ------------------------------------------------------


def _many(args: argparse.Namespace) -> int:
    """All pairs of a list; one that fails stops no other."""
    files.spare([args.manifest], args.file, [_JOURNAL])
    files.check_results(args.results)
    work = [(names, case, _find(args, case)) for names, case in _named(args)]
    with open_alone(Path(args.file) / _JOURNAL) as journal:
        return _submit(args, work, journal)


def _submit(args: argparse.Namespace, work: list[Work], journal: Journal) -> int:
    """Writes the fields that are not there yet; exit code."""
    todo, there = [], []
    for item in work:
        (there if _is_there(args, *item, journal) else todo).append(item)
    say = progress(args.quiet)
    warnings, failed = [], []
    for names, _, _ in there:
        _name_alike(*_places(args, names))
    for n, (names, case, path) in enumerate(todo, start=1):
        places, key = _places(args, names), _key(case, path)
        target, name = places[0], names[0]
        # Of before: no field may stand for a pair that fails now.
        _remove(places)
        journal.add({"id": name, "key": key})
        try:
            lines = _write(str(target), case, path)
            _name_alike(*places)
        except Exception as any_error:  # a fault of ours too: it stops no other
            error = of_item(any_error)
            _remove(places)
            journal.add({"id": name, "reason": error.reason})
            failed.append({"id": case.id, "reason": error.reason})
            warn(f"{case.id}: failed: {with_reason(error)}")
            continue
        made = files.sha256(target)
        journal.add({"id": name, "key": key, "sha256": made})
        say(f"{n}/{len(todo)} {shown(target)}")
        for line in lines:
            warn(f"{case.id}: {line}")
        warnings += [f"{case.id}: {one_line(line)}" for line in lines]
    done, kept = len(work) - len(failed), len(there)
    before = f", {kept} of them before" if kept else ""
    say(f"{done} of {len(work)} fields done{before}: {shown(args.file)}")
    if args.json:
        told = {"schema": 1, "verb": "convert", "to": args.to, "done": done}
        told |= {"kept": kept, "failed": failed, "warnings": warnings}
        print(json.dumps(told, indent=2), flush=True)
    if not failed:
        return 0
    return PARTLY if done else FAILED


def _find(args: argparse.Namespace, case: Case) -> str:
    return str(files.find_result(Path(args.results), case))


def _key(case: Case, path: str) -> dict[str, str | None]:
    """What a field is made of."""
    made_of = {"fixed": case.fixed, "moving": case.moving, "transform": path}
    return {name: files.sha256(file) for name, file in made_of.items()}


def _places(args: argparse.Namespace, names: list[str]) -> list[Path]:
    return [Path(args.file, name) for name in names]


def _remove(places: list[Path]) -> None:
    for place in places:
        place.unlink(missing_ok=True)


def _name_alike(target: Path, *others: Path) -> None:
    """Gives a field its other names; copies where the file system has no links."""
    for other in others:
        if other.exists():  # with these bytes: looked at
            continue
        with nifti.atomic_path(other) as temp:
            temp.unlink()
            try:
                os.link(target, temp)
            except OSError:
                shutil.copyfile(target, temp)


def _is_there(
    args: argparse.Namespace, names: list[str], case: Case, path: str, journal: Journal
) -> bool:
    """Whether the field is there, made of these files; refuses what is in its way.

    Of its further names those with other bytes are in its way.
    """
    target, *others = _places(args, names)
    for place in (target, *others):
        sibling = place.with_name(place.name.replace(".nii.gz", ".npz"))
        if sibling.exists():
            raise bad_file(
                sibling,
                "id_duplicate",
                f"{place.name} alone",
                "this file, which the challenge's script takes first",
                "move it away",
                USAGE,
            )
    known = None if args.overwrite or not target.is_file() else journal.last(names[0])
    made, there = files.sha256(target) if known else None, False
    if known and known.get("key") == _key(case, path):
        # A run that was ended before it could note the digest had written it whole.
        there = known.get("sha256") in (None, made)
    inputs = (case.fixed, case.moving, path)
    for place in others if there else (target, *others):
        if not (there and files.sha256(place) == made):
            files.output(str(place), (), overwrite=args.overwrite, inputs=inputs)
    return there


def _write(target: str, case: Case, path: str) -> list[str]:
    """The field of one pair; gives warnings."""
    fixed, moving = files.read_grid(case.fixed), files.read_grid(case.moving)
    whole, warnings = files.read_chain([path], fixed=fixed, moving=moving)
    mapping.write(target, whole, "l2r", fixed=fixed, moving=moving)
    return warnings


def _named(args: argparse.Namespace) -> list[tuple[list[str], Case]]:
    """Each pair of the list with the names that the challenge has for its field."""
    named, owners = [], {}
    for case in manifest.read_cases(args.manifest, roots=args.data_root):
        names = [f"{n}.nii.gz" for n in manifest.learn2reg_submission(case)]
        if not names:
            raise bad_file(
                Path(args.manifest).name,
                "name_mismatch",
                "scans called as TASK_0001_0000",
                f"{manifest.stem(case.fixed)} and {manifest.stem(case.moving)}",
                "convert them one by one with --transform",
                USAGE,
            )
        for name in names:
            other = owners.setdefault(name, case)
            if other != case:
                raise bad_file(
                    Path(args.manifest).name,
                    "id_duplicate",
                    "one pair for each field",
                    f"{other.id} and {case.id} for {name}",
                    "list the tasks apart",
                    USAGE,
                )
        named.append((names, case))
    return named

"""Carry out a plan, and take out what a manifest lists."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack, suppress
from copy import deepcopy
from pathlib import Path, PurePosixPath

from swtpm_prop import __version__, durable
from swtpm_prop.custody.form import Form, form
from swtpm_prop.errors import HostError
from swtpm_prop.install import manifest, tree
from swtpm_prop.install.manifest import Manifest
from swtpm_prop.install.plan import Block, Directory, File, Host, plan
from swtpm_prop.install.tree import at
from swtpm_prop.layout import Layout

Done = tuple[str, str]
"""What was done, and to which path of the host."""


def install(layout: Layout, host: Host) -> list[Done]:
    """Bring the host to the plan; what is there already stays, what an older release had and this has not goes.

    The manifest names each thing before it is made. So after a crash at any point this, or `uninstall`, works again.
    An error undoes every change.

    Raises:
        HostError: ``install.foreign-file``, ``install.changed-file``, ``install.foreign-block``,
            ``install.manifest-unreadable``; nothing was changed then.
        OSError: a file cannot be written; everything was undone.
    """
    steps = plan(host)
    pieces = [step for step in steps if not isinstance(step, Directory)]
    old = manifest.load(layout)
    for piece in pieces:
        _refuse_foreign(layout, piece, old)
    new = _intent(layout, steps, old)
    new.release, new.python = __version__, str(host.python)
    new.preload, new.package = str(host.preload), str(host.package)
    with ExitStack() as undo:
        holder, *others = [step for step in steps if isinstance(step, Directory)]
        done = _make(layout, holder, undo)
        if new != old:
            _record(layout, new, undo)
        done += [d for step in others for d in _make(layout, step, undo)]
        done += [d for piece in pieces for d in _put(layout, piece, undo)]
        done += _drop_obsolete(layout, pieces, new, undo)
        _settle(layout, pieces, new, old)
        undo.pop_all()
    return done


def _refuse_foreign(layout: Layout, piece: File | Block, old: Manifest | None) -> None:
    """What is there must be what we put there, or be it already."""
    content = tree.current(layout.root, piece)
    if content in (None, piece.content):
        return
    known = _hashes(old, piece)
    if tree.sha256(content or b"") in known:
        return
    path = at(layout.root, piece.path)
    if isinstance(piece, Block):
        raise HostError(
            "install.foreign-block", f"{path} has marked lines that are not ours", "take them out and try again"
        )
    if known:
        raise HostError(
            "install.changed-file", f"{path} was changed since it was installed", "move it away and try again"
        )
    raise HostError("install.foreign-file", f"{path} is in the way", "move it away and try again")


def _hashes(old: Manifest | None, piece: File | Block) -> list[str]:
    if old is None:
        return []
    return (old.blocks if isinstance(piece, Block) else old.files).get(str(piece.path), [])


def _intent(layout: Layout, steps: tuple[Directory | File | Block, ...], old: Manifest | None) -> Manifest:
    """The manifest to write before anything is done: everything that may be there from now on."""
    new = deepcopy(old) if old else Manifest("", "", "", "", since=int(time.time()))
    for step in steps:
        path = str(step.path)
        if isinstance(step, Directory):
            new.directories += [d for d in _missing(layout, step.path) if d not in new.directories]
            continue
        hashes = (new.blocks if isinstance(step, Block) else new.files).setdefault(path, [])
        if (digest := tree.sha256(step.content)) not in hashes:
            hashes.append(digest)
        if isinstance(step, Block) and not at(layout.root, path).exists() and path not in new.created:
            new.created.append(path)
    return new


def _missing(layout: Layout, path: PurePosixPath) -> list[str]:
    """The directories that must be made for ``path`` to exist, outermost first."""
    chain = [*reversed(path.parents), path]
    return [str(d) for d in chain if not at(layout.root, d).exists()]


def _make(layout: Layout, step: Directory, undo: ExitStack) -> list[Done]:
    done = []
    for name in _missing(layout, step.path):
        at(layout.root, name).mkdir()
        undo.callback(at(layout.root, name).rmdir)
        at(layout.root, name).chmod(0o755)
        done.append(("made", name))
    path = at(layout.root, step.path)
    before = tree.mode(path)
    if step.mode is not None and before != step.mode:
        path.chmod(step.mode)
        undo.callback(path.chmod, before)
        if not done:
            done.append(("set mode of", str(step.path)))
    return done


def _record(layout: Layout, new: Manifest, undo: ExitStack) -> None:
    """Write the intent; the executor's undoing puts the earlier manifest back."""
    path = manifest.path_of(layout)
    _undo_write(path, undo)
    new.complete = False
    new.save(layout)


def _undo_write(path: Path, undo: ExitStack) -> None:
    """Remember how ``path`` is now, to bring it back."""
    before = tree.read(path)
    if before is None:
        undo.callback(path.unlink, missing_ok=True)
    else:
        undo.callback(durable.replace, path, before, tree.mode(path))
    undo.callback(durable.leftover(path).unlink, missing_ok=True)


def _put(layout: Layout, piece: File | Block, undo: ExitStack) -> list[Done]:
    path = at(layout.root, piece.path)
    before = tree.current(layout.root, piece)
    if before == piece.content and (isinstance(piece, Block) or tree.mode(path) == piece.mode):
        return []
    _undo_write(path, undo)
    if isinstance(piece, Block):
        tree.set_block(path, piece.content)
        return [("put a block into", str(piece.path))]
    durable.replace(path, piece.content, piece.mode)
    return [("wrote" if before is None else "replaced", str(piece.path))]


def _drop_obsolete(layout: Layout, pieces: list[File | Block], new: Manifest, undo: ExitStack) -> list[Done]:
    """Take out what an older release had and this one has not."""
    wanted = {str(piece.path) for piece in pieces}
    done = []
    for path in [path for path in (*new.files, *new.blocks) if path not in wanted]:
        done += _take(layout, path, new, undo)
        new.files.pop(path, None)
        new.blocks.pop(path, None)
    return done


def _settle(layout: Layout, pieces: list[File | Block], new: Manifest, old: Manifest | None) -> None:
    """Everything is in place: from now on only this plan's contents are ours."""
    for piece in pieces:
        (new.blocks if isinstance(piece, Block) else new.files)[str(piece.path)] = [tree.sha256(piece.content)]
    new.complete = True
    if new != old:
        new.save(layout)


def uninstall(layout: Layout, *, purge: bool) -> list[Done]:
    """Take out what the manifest lists; what the operator changed stays and is named.

    Certificates, index, logs and the guests' markers stay as well, unless ``purge``.

    Raises:
        HostError: ``uninstall.not-installed``, ``uninstall.guests-running``, ``uninstall.guests-in-custody``,
            ``install.manifest-unreadable``.
    """
    listed = manifest.load(layout)
    if listed is None and not layout.state.exists():
        raise HostError("uninstall.not-installed", "swtpm-prop is not installed", "nothing is to be done")
    _refuse_running(layout)
    if purge:
        _refuse_in_custody(layout)
    done: list[Done] = []
    if listed:
        with ExitStack() as undo:
            for path in reversed([*listed.files, *listed.blocks]):
                done += _take(layout, path, listed, undo)
            undo.pop_all()
    if purge:
        done += _purge(layout)
    return done + _remove_record(layout, listed)


def _refuse_running(layout: Layout) -> None:
    running = running_guests(layout)
    if running:
        raise HostError(
            "uninstall.guests-running",
            f"guests with property banks are running: {', '.join(running)}",
            "shut them down and try again",
        )


def _refuse_in_custody(layout: Layout) -> None:
    """What opens their keys would go, and nothing says that it can be had again."""
    kept = in_custody(layout)
    if kept:
        raise HostError(
            "uninstall.guests-in-custody",
            f"the TPM states of these guests open by what would be removed: {', '.join(kept)}",
            "switch custody off (swtpm-prop domain disable) and start each once; or uninstall without --purge",
        )


def in_custody(layout: Layout) -> list[str]:
    """UUIDs of the guests whose TPM state here is encrypted under a key that this host keeps."""
    uuids = sorted(path.stem for path in layout.keys.glob("*.json"))
    return [uuid for uuid in uuids if form(layout.guest_tpm(uuid)) is Form.ENCRYPTED]


def running_guests(layout: Layout) -> list[str]:
    """UUIDs of the guests that have what one start needs, hence run or are being started."""
    return sorted(path.name for path in layout.run.glob("[0-9a-f]*-*-*-*-*"))


def opted_in(layout: Layout) -> list[str]:
    """UUIDs of the guests that must not start without the layer."""
    return sorted(path.name for path in layout.guests.glob("[0-9a-f]*-*-*-*-*"))


def _take(layout: Layout, path: str, listed: Manifest, undo: ExitStack) -> list[Done]:
    """Take a file or block out if it still is as we put it there, and forget it."""
    place = at(layout.root, path)
    blocks = path in listed.blocks
    hashes = (listed.blocks if blocks else listed.files)[path]
    content = tree.block(place) if blocks else _regular(place)
    durable.leftover(place).unlink(missing_ok=True)
    if content is None:
        return []
    if tree.sha256(content) not in hashes:
        return [("kept (changed since)", path)]
    _undo_write(place, undo)
    if not blocks:
        place.unlink()
        return [("removed", path)]
    tree.set_block(place, b"")
    if path in listed.created and not place.read_bytes():
        place.unlink()
    return [("took the block out of", path)]


def _regular(path: Path) -> bytes | None:
    """Like `tree.read`, but something foreign counts as changed content."""
    try:
        return tree.read(path)
    except HostError:
        return b""


def _purge(layout: Layout) -> list[Done]:
    done = []
    for path in (layout.logs, layout.run, layout.etc, layout.guests, layout.index.parent, layout.store):
        if path.exists():
            shutil.rmtree(path)
            done.append(("removed with its data", "/" + str(path.relative_to(layout.root))))
    return done


def _remove_record(layout: Layout, listed: Manifest | None) -> list[Done]:
    """Remove the directories that are empty now, and the manifest just before those that hold it."""
    own = (layout.index.parent, layout.guests, layout.etc, layout.arriving, layout.run, layout.logs, layout.libexec)
    made = [at(layout.root, path) for path in reversed(listed.directories if listed else [])]
    record = manifest.path_of(layout)
    holders = [path for path in made if path in record.parents]
    done = _remove_empty(layout, [*own, *(path for path in made if path not in holders)])
    record.unlink(missing_ok=True)
    durable.leftover(record).unlink(missing_ok=True)
    return done + _remove_empty(layout, [layout.state, *holders])


def _remove_empty(layout: Layout, paths: list[Path]) -> list[Done]:
    done = []
    for path in paths:
        with suppress(OSError):
            path.rmdir()
            done.append(("removed", "/" + str(path.relative_to(layout.root))))
    return done

"""Subjects of real Debian packages: against other programs, and against what a kernel measured of the same files."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from functools import partial
from pathlib import Path

import pytest
from packaged import make_deb

from lab import debian
from lab.guest import kernels
from swtpm_prop.errors import TrustError
from swtpm_prop.tpm import ima, imalog
from swtpm_prop.trust import dpkg, packages, sources
from swtpm_prop.trust.dpkg import Origin
from swtpm_prop.trust.sources import Subject

DATA = Path(__file__).parent.parent / "data"
SYSTEMD_BOOT = "usr/lib/systemd/boot/efi/systemd-bootx64.efi"


@pytest.fixture(scope="module")
def boot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian's systemd-boot and busybox in one package, with what is special beside them."""
    directory = tmp_path_factory.mktemp("boot")
    tree = directory / "tree"
    for package, path in (("systemd-boot-efi", SYSTEMD_BOOT), ("busybox-static", "bin/busybox")):
        (tree / path).parent.mkdir(parents=True)
        (tree / path).write_bytes((debian.package(package) / path).read_bytes())
    (tree / "boot").mkdir()
    (tree / "boot/initrd").write_bytes(b"initrd")
    (tree / "usr/share").mkdir()
    (tree / "usr/share/dos program.com").write_bytes(b"MZ\x90 of 1981")
    (tree / "usr/share/empty").touch()
    (tree / "usr/share/again").hardlink_to(tree / "bin/busybox")
    (tree / "usr/share/link").symlink_to("empty")
    return make_deb(directory, tree, more="Source: thing-source (2.0-1+signed)\n")


def by_name(subjects: list[Subject]) -> dict[str, Subject]:
    found = {subject.name: subject for subject in subjects}
    assert len(found) == len(subjects)
    return found


def test_everything_of_a_package(boot: Path) -> None:
    subjects = by_name(list(packages.from_deb(boot, with_ima=True)))
    efi = f"/{SYSTEMD_BOOT}"
    templated = [efi, "/bin/busybox", "/usr/bin/busybox", "/boot/initrd", "/usr/share/dos program.com"]
    templated += ["/usr/share/empty", "/usr/share/again"]
    expected = {f"{path} {template}" for path in templated for template in ima.FILE_TEMPLATES}
    assert subjects.keys() == expected | {efi, f"{efi} Authenticode", "/boot/initrd"}
    origin = {"package": "thing", "component": "thing-source", "version": "2.0-1+signed"}
    assert [subject.annotations for subject in subjects.values()] == [origin] * len(subjects)


def test_boot_files_are_those_of_the_other_sources(boot: Path) -> None:
    subjects = by_name(list(packages.from_deb(boot, with_ima=True)))
    original = debian.package("systemd-boot-efi") / SYSTEMD_BOOT
    (image,), (content,) = sources.from_pe(original), sources.from_file(original)
    assert subjects[f"/{SYSTEMD_BOOT} Authenticode"].digests == image.digests
    assert subjects[f"/{SYSTEMD_BOOT}"].digests == content.digests
    assert subjects["/boot/initrd"].digests["sha384"] == hashlib.sha384(b"initrd").digest()
    without = by_name(list(packages.from_deb(boot, with_ima=False)))
    assert without.keys() == {f"/{SYSTEMD_BOOT} Authenticode", f"/{SYSTEMD_BOOT}", "/boot/initrd"}


def test_a_unified_kernel_image_in_a_package_is_certified_as_one(tmp_path: Path) -> None:
    kernel = debian.kernel(debian.cloud_kernels()[0])
    stub = debian.package("systemd-boot-efi") / "usr/lib/systemd/boot/efi/linuxx64.efi.stub"
    tree = tmp_path / "tree"
    (tree / "boot").mkdir(parents=True)
    uki = tree / "boot/linux.efi"
    sections = ["--add-section", f".linux={kernel}", "--change-section-vma", ".linux=0x2000000"]
    subprocess.run(["objcopy", *sections, stub, uki], check=True)
    expected = {subject.name.replace(str(uki), "/boot/linux.efi") for subject in sources.from_uki(uki)}
    found = {subject.name for subject in packages.from_deb(make_deb(tmp_path, tree), with_ima=False)}
    assert found == expected | {"/boot/linux.efi"}
    assert "/boot/linux.efi .linux Authenticode" in found


@pytest.mark.parametrize("template", ima.FILE_TEMPLATES)
def test_ima_subjects_are_what_a_guest_measured(boot: Path, template: str) -> None:
    """The guest ran Debian's busybox as /bin/busybox, and once more through a merged /usr."""
    subjects = by_name(list(packages.from_deb(boot, with_ima=True)))
    entries = {entry.path: entry for entry in imalog.parse((DATA / f"{template}.imalog").read_bytes())}
    entry = entries[b"/bin/busybox"]
    # The guest's busybox may be another build than today's: the rule is compared, with the guest's hash.
    made = ima.file_measurement(template, b"/bin/busybox", entry.digest)
    assert made == entry.data
    content = (debian.package("busybox-static") / "bin/busybox").read_bytes()
    now = ima.file_measurement(template, b"/bin/busybox", hashlib.sha256(content).digest())
    assert subjects[f"/bin/busybox {template}"].digests == {"sha256": hashlib.sha256(now).digest()}
    again = ima.file_measurement(template, b"/usr/share/again", hashlib.sha256(content).digest())
    assert subjects[f"/usr/share/again {template}"].digests == {"sha256": hashlib.sha256(again).digest()}


def from_tree(tree: Path, *, with_ima: bool = True) -> list[Subject]:
    take = partial(packages.from_tree, tree, owners=dpkg.owners(tree), with_ima=with_ima)
    return [subject for path in packages.files(tree) for subject in take(path)]


def test_a_tree_says_what_its_package_says(boot: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", boot, tmp_path / "tree"], check=True)
    of_deb = {subject.name: subject.digests for subject in packages.from_deb(boot, with_ima=True)}
    of_tree = from_tree(tmp_path / "tree")
    assert {subject.name: subject.digests for subject in of_tree} == of_deb
    assert not [subject for subject in of_tree if subject.annotations]


def test_an_installed_tree_names_its_packages(boot: Path, tmp_path: Path) -> None:
    """Installed by dpkg into a merged /usr."""
    tree = tmp_path / "tree"
    for directory in ("usr/bin", "var/lib/dpkg/info", "var/lib/dpkg/updates", "etc"):
        (tree / directory).mkdir(parents=True)
    (tree / "bin").symlink_to("usr/bin")
    (tree / "var/lib/dpkg/status").touch()
    options = [f"--root={tree}", "--force-all", "--no-triggers", "-i"]
    subprocess.run(["dpkg", *options, boot], check=True, capture_output=True)
    (tree / "etc/mine").write_text("not of a package")
    subjects = by_name(from_tree(tree))
    assert subjects["/usr/bin/busybox ima-sig"].annotations["component"] == "thing-source"
    assert "/bin/busybox ima-sig" not in subjects
    assert not subjects["/etc/mine ima-sig"].annotations


def test_a_real_kernel_package(tmp_path: Path) -> None:
    deb = debian.archive(kernels(1, "6.1")[0])
    origin = dpkg.origin(deb)
    assert origin.component == "linux-signed-amd64"
    assert origin.version.startswith("6.1.")
    subjects = by_name(list(packages.from_deb(deb, with_ima=True)))
    (kernel,) = (name for name in subjects if name.startswith("/boot/vmlinuz-") and name.endswith("Authenticode"))
    subprocess.run(["dpkg-deb", "-x", deb, tmp_path], check=True)
    (expected,) = sources.from_pe(next((tmp_path / "boot").glob("vmlinuz-*")))
    assert subjects[kernel].digests == expected.digests
    modules = [name for name in subjects if ".ko" in name]
    assert len(modules) > 1000
    assert any(name.startswith("/usr/lib/modules/") for name in modules)


def refused(deb: Path) -> TrustError:
    with pytest.raises(TrustError) as caught:
        list(packages.from_deb(deb, with_ima=True))
    assert caught.value.line().isprintable()
    return caught.value


def test_bad_packages(boot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.deb"
    text.write_text("no package")
    assert refused(text).id == "source.deb"
    assert refused(tmp_path / "-absent").id == "source.deb"
    cut = tmp_path / "cut.deb"
    cut.write_bytes(boot.read_bytes()[:-5000])
    assert refused(cut).id == "source.deb"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(boot).id == "source.dpkg-missing"


def test_leaving_early_leaves_no_program_behind(boot: Path) -> None:
    before = children()
    members = dpkg.members(boot)
    next(members)
    assert children() > before
    members.close()
    assert children() == before


def children() -> set[str]:
    """The processes that this one has started and not yet waited for."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_hostile_archives(tmp_path: Path) -> None:
    """Names that climb out or act on a terminal are labels of what is certified, and nothing is unpacked."""
    archive = tmp_path / "data.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("../../../climbed", "/etc/\x1b[2J", "./usr/./bin//x"):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("to-nothing")
        link.type, link.linkname = tarfile.LNKTYPE, "absent"
        tar.addfile(link)
    with archive.open("rb") as stream:
        paths = [member.path for member in dpkg._members(stream)]
    assert paths == [b"/climbed", b"/etc/\x1b[2J", b"/usr/bin/x", b"/to-nothing"]
    assert not list(tmp_path.glob("**/climbed"))


@pytest.mark.parametrize("line", ["", "a\tb\t1", "x/../y\tsource\t1", "thing\tsource\t", "thing\tsource\tone", "thing"])
def test_strange_control_files(line: str) -> None:
    with pytest.raises(TrustError) as caught:
        dpkg._origin(line, "x.deb")
    assert caught.value.id == "source.deb"


def test_annotations_and_bad_trees(tmp_path: Path) -> None:
    assert packages.annotate(Origin("p", "s", "1")) == {"package": "p", "component": "s", "version": "1"}
    with pytest.raises(TrustError, match="no directory"):
        packages.files(tmp_path / "absent")

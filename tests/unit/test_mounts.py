"""What kind of file system a path is on."""

from __future__ import annotations

from pathlib import Path

import pytest

from swtpm_prop.custody import mounts

MOUNTS = r"""27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
30 27 0:27 / /srv rw,relatime shared:7 master:1 - nfs4 store:/srv rw,vers=4.2
31 30 0:31 / /srv/a\040b rw - xfs /dev/vdb rw
32 27 0:32 / /run rw - ext4 /dev/vdc rw
33 32 0:33 / /run rw - tmpfs tmpfs rw
34 27 0:34 /sub /home rw - btrfs /dev/vdd rw,subvol=/sub
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/srvs/guest", "ext4"),
        ("/srv", "nfs4"),
        ("/srv/guest", "nfs4"),
        ("/srv/a b/guest", "xfs"),
        ("/srv/a", "nfs4"),
        ("/run/swtpm-prop", "tmpfs"),
        ("/home/guest", "btrfs"),
    ],
)
def test_the_nearest_and_newest_mount_counts(tmp_path: Path, path: str, kind: str) -> None:
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTS)
    assert mounts.kind(Path(path), file) == kind


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/shm")
    assert mounts.kind(tmp_path / "link/guest") in mounts.MEMORY
    assert mounts.kind(tmp_path) in mounts.OWN


def test_what_others_can_mount_too_is_nobodys_own() -> None:
    assert not mounts.OWN & {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "ceph",
        "gfs2",
        "ocfs2",
        "gpfs",
        "fuse.glusterfs",
        "afs",
        "",
    }

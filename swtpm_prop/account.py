"""The user that libvirt runs swtpm as: who must be able to read a guest's layer and to write its property log."""

from __future__ import annotations

import grp
import pwd
import re
from typing import NamedTuple

from swtpm_prop.errors import HostError
from swtpm_prop.layout import Layout

DEFAULT = "tss"
"""libvirt's default on Debian and Fedora (meson option, src/qemu/qemu_conf.c: swtpm_user)."""

_SETTING = re.compile(r'^[ \t]*(swtpm_user|swtpm_group)[ \t]*=[ \t]*"([^"\n]*)"', re.MULTILINE)


class Account(NamedTuple):
    """Numbers of the user and of the group."""

    uid: int
    gid: int


def swtpm_account(layout: Layout) -> Account:
    """Read ``swtpm_user`` and ``swtpm_group`` from qemu.conf; without a group there the user's own counts.

    Raises:
        HostError: ``host.swtpm-user``: there is no such user or group.
    """
    try:
        text = layout.qemu_conf.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = ""
    settings = dict(_SETTING.findall(text))
    user, group = settings.get("swtpm_user", DEFAULT), settings.get("swtpm_group", "")
    try:
        entry = pwd.getpwuid(int(user[1:])) if _is_number(user) else pwd.getpwnam(user)
        return Account(entry.pw_uid, _gid(group) if group else entry.pw_gid)
    except KeyError as error:
        raise HostError(
            "host.swtpm-user",
            f"this host has no user '{user}' or no group '{group}' for swtpm",
            "install swtpm, or correct swtpm_user and swtpm_group in /etc/libvirt/qemu.conf",
        ) from error


def _gid(group: str) -> int:
    return int(group[1:]) if _is_number(group) else grp.getgrnam(group).gr_gid


def _is_number(name: str) -> bool:
    """libvirt reads "+107" as a number (src/util/virutil.c, virGetUserID)."""
    return re.fullmatch(r"\+[0-9]{1,9}", name) is not None

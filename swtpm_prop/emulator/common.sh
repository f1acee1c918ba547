#!/bin/sh
# Stands before the real program in libvirt's PATH. A guest that did not opt in gets the real one, as it was called.
# No process is started before the exec: descriptors, locks, signals and the process id stay what the caller made.

prop_name=${0##*/}
prop_log=''

prop_refuse() { # WHAT ID MEND
    printf 'swtpm-prop: %s [%s]: %s\n' "$1" "$2" "$3" >&2
    [ -z "$prop_log" ] || printf 'swtpm-prop: %s [%s]: %s\n' "$1" "$2" "$3" 2>/dev/null >>"$prop_log"
    exit 1
}

# The first program of our name in PATH that is not this very file, else Debian's; prop_path is PATH without us.
prop_find_real() {
    prop_real='' prop_path='' prop_rest=${PATH-}:
    while [ -n "$prop_rest" ]; do
        prop_entry=${prop_rest%%:*} prop_rest=${prop_rest#*:}
        # shellcheck disable=SC3013  # -ef sees through links to our directory; dash, bash and busybox have it
        if [ "$prop_entry" -ef '@LIBEXEC@' ] || [ "$prop_entry/$prop_name" -ef "$0" ]; then
            continue
        fi
        prop_path=$prop_path${prop_path:+:}$prop_entry
        case $prop_entry in
            /*) [ -n "$prop_real" ] || ! [ -f "$prop_entry/$prop_name" ] || ! [ -x "$prop_entry/$prop_name" ] ||
                    prop_real=$prop_entry/$prop_name ;;
        esac
    done
    [ -n "$prop_real" ] || prop_real=/usr/bin/$prop_name
}

# The opted-in guest of whose UUID a directory in some argument has the name; libvirt puts the TPM's state there.
# Names of guests cannot do it: they hold no slash.
prop_find_guest() {
    prop_guest=''
    for prop_rest do
        while :; do
            case $prop_rest in
                */*) prop_entry=${prop_rest%%/*} prop_rest=${prop_rest#*/} ;;
                *) break ;;
            esac
            case $prop_entry in
                *[!0-9a-f-]*) continue ;;
                ????????-????-????-????-????????????) ;;
                *) continue ;;
            esac
            if [ -d '@RUN@'/"$prop_entry" ] || [ -e '@GUESTS@'/"$prop_entry" ]; then
                prop_guest=$prop_entry
                return
            fi
        done
    done
}

# Never take a guest for one that did not opt in because we cannot look, or because the hook did not run.
prop_check_guest() {
    for prop_entry in '@GUESTS@' '@STATE@'; do
        [ ! -e "$prop_entry" ] || [ -x "$prop_entry" ] || prop_refuse \
            "$prop_entry cannot be searched, so nobody knows whether this guest opted in" \
            layer.guests-unreadable "chmod 0711 $prop_entry"
    done
    [ -z "$prop_guest" ] || [ -d '@RUN@'/"$prop_guest" ] || prop_refuse \
        "guest $prop_guest opted in, but nothing was prepared for this start" layer.not-prepared \
        "check that the hook of swtpm-prop is installed and executable, run 'swtpm-prop doctor'"
}

# Where the guest's key is in custody, the hook leaves it in memory until the guest has started; prop_key is its file.
# Its sign `keyed` stays as long as what was prepared: a start that comes after that one must not do without the key.
prop_find_key() {
    prop_key='@RUN@'/"$prop_guest"/state-key
    [ -e "$prop_key" ] || [ -e '@RUN@'/"$prop_guest"/keyed ] || prop_key=''
    [ -z "$prop_key" ] || { [ -r "$prop_key" ] && [ -r '@RUN@'/"$prop_guest"/migration-key ]; } || prop_refuse \
        "the keys of the TPM state in @RUN@/$prop_guest are missing or not readable for this user" \
        layer.key-unreadable 'shut the guest down and start it again; the hook writes these files'
}

# Open a file for reading; prop_free is its descriptor, one of those that every sh can name.
prop_open() { # FILE
    for prop_free in 9 8 7 6 5 4 3 none; do
        [ "$prop_free" != none ] || break
        { true <&"$prop_free"; } 2>/dev/null || break
    done
    [ "$prop_free" != none ] || prop_refuse "there is no free descriptor for the keys of the TPM state" \
        layer.no-descriptor 'report this with the version of libvirt'
    eval "exec $prop_free<\"\$1\""
}

# -- swtpm_setup: the real one; for an opted-in guest it activates the property banks too

prop_find_real
# It starts swtpm by itself, to make or change the state: that must be the real one.
PATH=$prop_path
prop_previous=''
for prop_entry do
    case $prop_entry in
        --print-capabilities | --print-states | --print-profiles | --version | --help | -h)
            exec "$prop_real" "$@" ;;
    esac
    # virsh shows nothing of a swtpm_setup that fails but the name of this file.
    [ "$prop_previous" != --logfile ] || prop_log=$prop_entry
    prop_previous=$prop_entry
done
prop_find_guest "$@"
prop_check_guest
[ -n "$prop_guest" ] || exec "$prop_real" "$@"

prop_banks=''
[ ! -r '@RUN@'/"$prop_guest"/pcr-banks ] || IFS= read -r prop_banks <'@RUN@'/"$prop_guest"/pcr-banks
[ -n "$prop_banks" ] || prop_refuse \
    "@RUN@/$prop_guest/pcr-banks is missing, empty or not readable for this user" layer.banks-unreadable \
    'shut the guest down and start it again; the hook writes this file'
prop_find_key
[ -z "$prop_key" ] || set -- "$@" --keyfile "$prop_key" --cipher aes-256-cbc
# Of several --pcr-banks swtpm_setup takes the last.
exec "$prop_real" "$@" --pcr-banks "$prop_banks"

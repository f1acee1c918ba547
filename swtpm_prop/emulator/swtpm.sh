# -- swtpm: the real one, for an opted-in guest with the layer preloaded

prop_find_real
for prop_entry do
    case $prop_entry in
        --print-capabilities | --print-states | --print-info | --print-info=* | --print-profiles | \
            --version | -v | --help | -h) exec "$prop_real" "$@" ;;
    esac
done
prop_find_guest "$@"
prop_check_guest
[ -n "$prop_guest" ] || exec "$prop_real" "$@"

# The real swtpm refuses this word: only the preloaded object, once the layer stands, makes it the right one.
case ${1-} in
    socket) prop_word=Socket ;;
    chardev) prop_word=Chardev ;;
    cuse) prop_word=Cuse ;;
    *) exec "$prop_real" "$@" ;;
esac
shift
[ -r '@PRELOAD@' ] || prop_refuse \
    '@PRELOAD@ is missing or not readable for this user' layer.preload-unreadable \
    'install swtpm-prop where the swtpm user can read it'
[ -r '@RUN@'/"$prop_guest"/layer.json ] || prop_refuse \
    "@RUN@/$prop_guest/layer.json is missing or not readable for this user" layer.config-unreadable \
    'shut the guest down and start it again; the hook writes this file'
prop_find_key
if [ -n "$prop_key" ]; then
    # Opened here: the hook removes the files once libvirt sees the control socket, which swtpm makes before it reads.
    # Only descriptors that the caller has not used; swtpm closes them. Arguments and environment never hold a key.
    prop_open "$prop_key"
    set -- "$@" --key "fd=$prop_free,mode=aes-256-cbc,format=hex"
    prop_open "@RUN@/$prop_guest/migration-key"
    set -- "$@" --migration-key "fd=$prop_free,mode=aes-256-cbc,format=hex"
fi
export SWTPM_PROP_LAYER='@RUN@'/"$prop_guest"/layer.json
export LD_PRELOAD='@PRELOAD@'"${LD_PRELOAD:+:$LD_PRELOAD}"
exec "$prop_real" "$prop_word" "$@"

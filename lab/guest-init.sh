#!/bin/busybox sh
# Process 1 of a laboratory guest: mounts what measurements need, then answers the console protocol of lab/console.py
# on the first serial port:
#   new ID          begin a command
#   add ID BASE64   append to it
#   run ID MD5      run it in a subshell and say the answer; a known ID is only answered again, and a command that
#                   did not arrive whole (MD5 is that of all its BASE64) is not run
#   say ID          say the answer to ID again
# An answer is one line: [lab ID STATUS MD5 BASE64 lab], or [lab ID ? lab] where ID is not known.
export PATH=/bin HOME=/ TPM2TOOLS_TCTI=device:/dev/tpmrm0
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t securityfs sec /sys/kernel/security
dmesg -n 1
for module in /lib/modules/*.ko; do insmod "$module"; done 2>/dev/null
[ -d /sys/firmware/efi ] && mount -t efivarfs efivarfs /sys/firmware/efi/efivars
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo

say() {
  if [ "$1" = "$answered" ]; then
    printf '\n[lab %s %s %s ' "$1" "$status" "$(md5sum </run/output | cut -d' ' -f1)"
    base64 -w0 /run/output
    printf ' lab]\n'
  else
    printf '\n[lab %s ? lab]\n' "$1"
  fi
}

read -r uptime _ </proc/uptime
printf '\n[lab ready %s %s]\n' "$(uname -r)" "$uptime"
while :; do
  read -r verb id data || continue
  case $verb in
    new) command= ;;
    add) command=$command$data ;;
    run)
      if [ "$id" != "$answered" ] && [ "$(printf %s "$command" | md5sum)" = "$data  -" ]; then
        printf %s "$command" | base64 -d >/run/command
        (. /run/command) </dev/null >/run/output 2>&1
        status=$?
        answered=$id
      fi
      say "$id"
      ;;
    say) say "$id" ;;
  esac
done

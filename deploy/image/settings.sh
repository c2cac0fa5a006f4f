# What goes into the image. Every value here changes the measurement; commit what you deploy. Read by build.sh and seal.sh.

# Debian's archive as it was at this time: the same packages for ever. Set MIRROR to a mirror of the same state if you have one.
SNAPSHOT=20261101T000000Z
MIRROR=${MIRROR:-http://snapshot.debian.org/archive/debian/$SNAPSHOT}
SUITE=trixie
KERNEL_SUITE=trixie-backports   # a guest needs 6.7 for SEV-SNP reports, 6.16 to extend TDX's RTMR3
KERNEL_PACKAGE=linux-image-cloud-amd64

# One moment for all time stamps.
export SOURCE_DATE_EPOCH=1793491200

# dm-verity: fixed, so that the same tree gives the same root hash. Neither is a secret.
VERITY_SALT=636c6f69737465720000000000000000000000000000000000000000000000aa
VERITY_UUID=636c6f69-7374-4572-8000-000000000001

# Disks are found by the serial numbers that the host gives them; what is on them is checked against root hash and configuration hash.
COMMAND_LINE_FIXED="root=/dev/mapper/root rootfstype=squashfs ro systemd.volatile=state\
 systemd.verity_root_data=/dev/disk/by-id/virtio-cloister-root systemd.verity_root_hash=/dev/disk/by-id/virtio-cloister-verity\
 rd.shell=0 rd.emergency=poweroff systemd.gpt_auto=0 systemd.getty_auto=0 systemd.import_credentials=0 systemd.debug_shell=0\
 lockdown=confidentiality module.sig_enforce=1 panic=1 oops=panic console=hvc0"

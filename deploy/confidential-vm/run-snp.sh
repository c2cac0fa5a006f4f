#!/usr/bin/env bash
# Start the image as an SEV-SNP guest. The host has no say in what runs: it can only start this, or something with other evidence.
#
#   ./run-snp.sh IMAGE_FOLDER CONFIG OVMF VCPUS STATE_DISK MODEL_DISK
#
# Host: Linux 6.11 or later with KVM's SEV-SNP, QEMU 9.1 or later, OVMF built from OvmfPkg/AmdSev (it checks kernel, initrd and
# command line against the hashes that were measured; other builds measure them without checking).
set -euo pipefail
image=$1 config=$2 ovmf=$3 vcpus=$4 state=$5 model=$6
host_data=$(openssl dgst -sha256 -binary "$config" | base64 -w0)

exec qemu-system-x86_64 -enable-kvm -nodefaults -no-reboot -display none \
    -machine q35,confidential-guest-support=sev0,memory-backend=ram0 -cpu EPYC-v4 -smp "$vcpus" \
    -object memory-backend-memfd,id=ram0,size="${MEMORY:-32G}" -m "${MEMORY:-32G}" \
    -object sev-snp-guest,id=sev0,cbitpos=51,reduced-phys-bits=1,policy=0x30000,kernel-hashes=on,host-data="$host_data" \
    -bios "$ovmf" -kernel "$image/kernel" -initrd "$image/initrd" -append "$(cat "$image/cmdline")" \
    -drive if=none,id=root,format=raw,readonly=on,file="$image/root.squashfs" -device virtio-blk-pci,drive=root,serial=cloister-root \
    -drive if=none,id=verity,format=raw,readonly=on,file="$image/root.verity" -device virtio-blk-pci,drive=verity,serial=cloister-verity \
    -drive if=none,id=config,format=raw,readonly=on,file="$config" -device virtio-blk-pci,drive=config,serial=cloister-config \
    -drive if=none,id=state,format=raw,file="$state" -device virtio-blk-pci,drive=state,serial=cloister-state \
    -drive if=none,id=model,format=raw,readonly=on,file="$model" -device virtio-blk-pci,drive=model,serial=cloister-model \
    -netdev user,id=net,hostfwd=tcp::7443-:7443 -device virtio-net-pci,netdev=net \
    -chardev stdio,id=console -device virtio-serial-pci -device virtconsole,chardev=console

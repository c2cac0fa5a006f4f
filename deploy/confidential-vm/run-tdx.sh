#!/usr/bin/env bash
# Start the image as a TDX guest. The firmware starts cloister.efi from a FAT file system without partition table.
#
#   ./run-tdx.sh IMAGE_FOLDER CONFIG OVMF VCPUS STATE_DISK MODEL_DISK
#
# Host: Linux 6.16 or later with KVM's TDX, QEMU 10.1 or later, OVMF with TDX support (OvmfPkg/IntelTdx or OvmfPkgX64), mtools.
# MRCONFIGID carries the configuration's hash too, for people who look at a quote; the policy checks RTMR3, which the guest extends.
set -euo pipefail
image=$1 config=$2 ovmf=$3 vcpus=$4 state=$5 model=$6
config_id=$(openssl dgst -sha384 -binary "$config" | base64 -w0)

boot=$(mktemp)
trap 'rm -f "$boot"' EXIT
truncate -s $(($(stat -c %s "$image/cloister.efi") / 1048576 + 16))M "$boot"
mformat -i "$boot" -N 636c6f69 -v CLOISTER ::
mmd -i "$boot" ::/EFI ::/EFI/BOOT
mcopy -i "$boot" "$image/cloister.efi" ::/EFI/BOOT/BOOTX64.EFI

qemu-system-x86_64 -enable-kvm -nodefaults -no-reboot -display none \
    -machine q35,kernel-irqchip=split,confidential-guest-support=tdx0 -cpu host -smp "$vcpus" -m "${MEMORY:-32G}" \
    -object '{"qom-type":"tdx-guest","id":"tdx0","mrconfigid":"'"$config_id"'","quote-generation-socket":{"type":"vsock","cid":"2","port":"4050"}}' \
    -bios "$ovmf" \
    -drive if=none,id=boot,format=raw,readonly=on,file="$boot" -device virtio-blk-pci,drive=boot,serial=cloister-boot,bootindex=1 \
    -drive if=none,id=root,format=raw,readonly=on,file="$image/root.squashfs" -device virtio-blk-pci,drive=root,serial=cloister-root \
    -drive if=none,id=verity,format=raw,readonly=on,file="$image/root.verity" -device virtio-blk-pci,drive=verity,serial=cloister-verity \
    -drive if=none,id=config,format=raw,readonly=on,file="$config" -device virtio-blk-pci,drive=config,serial=cloister-config \
    -drive if=none,id=state,format=raw,file="$state" -device virtio-blk-pci,drive=state,serial=cloister-state \
    -drive if=none,id=model,format=raw,readonly=on,file="$model" -device virtio-blk-pci,drive=model,serial=cloister-model \
    -netdev user,id=net,hostfwd=tcp::7443-:7443 -device virtio-net-pci,netdev=net \
    -chardev stdio,id=console -device virtio-serial-pci -device virtconsole,chardev=console

#!/bin/busybox sh
# What AWS's init does, as far as an emulated enclave with another kernel can have it: modules, the files env and cmd,
# the mounts in the root file system, the program. There is no parent here to send the heartbeat to.
exec 2>&1
export PATH=/bin
/bin/busybox mkdir -p /proc /sbin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
exec >/dev/console 2>&1
for module in virtio_mmio vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport; do
    insmod "/modules/$module.ko" || echo "no module $module"
done
insmod /nsm.ko || echo "no module nsm"
echo "init: started"
cd /rootfs || exit 1
# Without making a folder: the image has to have them.
mount -t devtmpfs dev dev && mount -t proc proc proc && mount -t tmpfs tmpfs run && mount -t tmpfs tmpfs tmp &&
    mount -t sysfs sysfs sys || exit 1
set --
while IFS= read -r line; do set -- "$@" "$line"; done </cmd
IFS='
'
variables=$(cat /env)
rm /env /cmd
cp /registers.py tmp
env -i $variables chroot /rootfs "$1" -I -B /tmp/registers.py </dev/null
rm tmp/registers.py
free -m | grep Mem:
env -i $variables chroot /rootfs "$@" </dev/null
echo "init: the program ended with status $?"
reboot -f

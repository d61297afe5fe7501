#!/bin/busybox sh
# Init of L1 for `cargo xtask rig --shell-command`: runs /host/command.sh and powers off.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
while read -r module; do
    insmod "$module" || echo "VPCI-FAIL insmod $module"
done < /lib/modules.list
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host
ulimit -l unlimited
while read -r device; do
    folder=/sys/bus/pci/devices/$device
    echo vfio-pci > "$folder/driver_override"
    [ ! -e "$folder/driver" ] || echo "$device" > "$folder/driver/unbind"
    echo "$device" > /sys/bus/pci/drivers_probe
    case $(readlink "$folder/driver") in
    */vfio-pci) ;;
    *) echo "VPCI-FAIL $device is not bound to vfio-pci" ;;
    esac
done < /host/devices
cd /tmp
echo "VPCI-SHELL begin"
sh /host/command.sh < /dev/null 2>&1
echo "VPCI-SHELL end $?"
poweroff -f

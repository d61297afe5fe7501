# What maps and unmaps cost behind the vIOMMU of QEMU (intel-iommu with caching-mode=on), for comparing with
# `cargo xtask rig vfio-map`: the same guest, benchmark and device, in L1.
#
#     cargo xtask rig --shell-command "$(cat guest-images/measure/qemu-map-cost.sh)" \
#         --devices edu --emulator --l1-kernel linux-7-pviommu
mount -t tracefs tr /sys/kernel/tracing; T=/sys/kernel/tracing
E=/host/emulator
export QEMU_MODULE_DIR=$E/usr/lib/x86_64-linux-gnu/qemu
count() { n=0; for f in $T/per_cpu/cpu*/stats; do while read k v; do case $k in entries:|overrun:) n=$((n+v));; esac; done < $f; done; echo $n; }
run() {
  echo "=== QEMU $1"
  for e in map unmap; do echo 0 > $T/events/iommu/$e/enable; done
  echo > $T/trace; echo 1 > $T/events/iommu/map/enable;  echo 1 > $T/events/iommu/unmap/enable
  timeout 150 $E/usr/lib64/ld-linux-x86-64.so.2 --library-path $E/usr/lib/x86_64-linux-gnu $E/usr/bin/qemu-system-x86_64 -L $E/usr/share/qemu -L $E/usr/share/seabios \
   -accel kvm -machine q35,kernel-irqchip=split -cpu host -smp 2 -m 512 -nodefaults -display none -serial stdio -no-reboot \
   -device intel-iommu,caching-mode=on,intremap=on -device vfio-pci,host=$DEV,bus=pcie.0,addr=0x3 \
   -kernel /host/linux-7-pviommu.vmlinuz -initrd /host/linux-7-pviommu.initramfs \
   -append "console=ttyS0 panic=-1 quiet vpci.role=guest vpci.mode=map-benchmark vpci.marks=0 vpci.counted=0 vpci.limit=140 vpci.expect=0000:00:03.0=edu intel_iommu=on $1" | grep -a "vpci\|pages\|FAIL\|panic" | cut -c1-300
  echo "host iommu map+unmap events: $(count)"
}
DEV=0000:00:10.0
run iommu.strict=1
run iommu.strict=0

//! The same guest as libvirt's XML: machine, processor, memory, disk, network card, source of chance and their places on
//! the bus are those of `whimbrel`'s guests, and nothing that libvirt would add by itself is there.
//!
//! One thing more: a second monitor, on which QEMU tells its events to the bench.

use std::path::Path;

use crate::stage::{Engine, Shape};

/// Where things are that a domain's XML names.
#[derive(Debug)]
pub(crate) struct Places<'a> {
    /// QEMU.
    pub(crate) engine: &'a Path,
    /// The folder with the kernel and the witness.
    pub(crate) boot: &'a Path,
    pub(crate) disk: &'a Path,
    /// Where QEMU listens for the bench, as QEMU sees it.
    pub(crate) monitor: &'a str,
    /// The bridge that the lab's agents have made.
    pub(crate) bridge: &'a str,
}

/// The guest's definition.
pub(crate) fn xml(shape: &Shape, engine: &Engine, places: &Places<'_>) -> String {
    let (name, number) = (&shape.name, shape.number);
    let machine = engine.machine;
    let memory_mib = shape.memory_mib;
    let words = shape.kernel_words();
    let boot = places.boot.display();
    let (program, disk) = (places.engine.display(), places.disk.display());
    let (monitor, bridge) = (places.monitor, places.bridge);
    format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{boot}/vmlinuz</kernel>
    <initrd>{boot}/witness.initramfs</initrd>
    <cmdline>{words}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
  <clock offset='utc'/>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{program}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' io='threads' discard='unmap'/>
      <source file='{disk}'/>
      <target dev='vda' bus='virtio'/>
      <serial>vda</serial>
      <address type='pci' domain='0' bus='0' slot='0x0b' function='0'/>
    </disk>
    <interface type='bridge'>
      <mac address='52:54:00:76:00:{number:02x}'/>
      <source bridge='{bridge}'/>
      <model type='virtio'/>
      <rom enabled='no'/>
      <address type='pci' domain='0' bus='0' slot='0x03' function='0'/>
    </interface>
    <rng model='virtio'>
      <backend model='random'>/dev/urandom</backend>
      <address type='pci' domain='0' bus='0' slot='0x02' function='0'/>
    </rng>
    <serial type='null'><target port='0'/></serial>
    <console type='null'><target type='serial' port='0'/></console>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <audio id='1' type='none'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-chardev'/>
    <qemu:arg value='socket,id=bench,path={monitor},server=on,wait=off'/>
    <qemu:arg value='-mon'/>
    <qemu:arg value='chardev=bench,mode=control'/>
  </qemu:commandline>
</domain>
"
    )
}

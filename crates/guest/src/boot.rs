//! Init: makes the bare kernel a machine that the witness can live in, in the order that things need each other.
//!
//! The initramfs holds this program as `/init`, the kernel modules in `/modules`, and their order in
//! `/modules/load`; see the lab's image.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::panic;
use std::path::Path;
use std::process;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::config::{Address, Config};
use crate::console::Console;
use crate::witness::Witness;
use crate::{control, netlink, power};

/// How long a device may take to appear after its module is loaded.
const DEVICE_WAIT: Duration = Duration::from_secs(5);
const DEVICE_POLL: Duration = Duration::from_millis(10);
/// Memory that is left to the kernel and to the witness itself.
const MEMORY_LEFT_MIB: u64 = 48;

/// Boots, and goes on for ever.
pub(crate) fn boot() -> ! {
    if let Err(error) = mount_all() {
        die(&format!("cannot mount the kernel's file systems: {error}"));
    }
    let console = match Console::open() {
        Ok(console) => Arc::new(console),
        Err(error) => die(&format!("cannot open the serial console: {error}")),
    };
    console.say("witness: booting");
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let (mut config, mut errors) = Config::parse(&command_line);
    errors.extend(load_modules().err());
    errors.extend(bring_up_network(config.address).err());
    errors.extend(limit_memory(&mut config));
    wait_for_disk();
    let witness = Arc::new(Witness::new(&config, errors));
    report_panics(&witness, &console);
    witness.start(config.verify_mb_per_s);
    watch_power_button(&witness);
    serve(&witness, &console);
    for error in witness.report().errors {
        console.say(&format!("witness: {error}"));
    }
    console.say(&format!("witness: ready after {} ms", witness.report().uptime_ms));
    let telling = Arc::clone(&console);
    witness.spawn(move |witness| telling.keep_telling(witness));
    console.keep_answering()
}

/// Before there is a console, and when there is no way to go on: the kernel panics when init ends, and says so.
fn die(reason: &str) -> ! {
    crate::console::say_to_stderr(reason);
    process::exit(1);
}

fn mount_all() -> io::Result<()> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target)?;
        mount(kind, target, kind, MountFlags::empty(), None)?;
    }
    Ok(())
}

/// Loads the modules in the order of their list; one that the kernel already has is fine.
fn load_modules() -> Result<(), String> {
    let list = fs::read_to_string("/modules/load")
        .map_err(|error| format!("there is no list of modules: {error}"))?;
    for name in list.lines() {
        let file = fs::File::open(Path::new("/modules").join(name))
            .map_err(|error| format!("there is no module {name}: {error}"))?;
        match rustix::system::finit_module(file.as_fd(), c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(format!("the kernel refuses the module {name}: {error}")),
        }
    }
    Ok(())
}

fn bring_up_network(address: Option<Address>) -> Result<(), String> {
    let failed = |what: &str, error: io::Error| format!("cannot {what}: {error}");
    netlink::up(1).map_err(|error| failed("switch lo on", error))?;
    let Some(address) = address else { return Ok(()) };
    let index = Path::new("/sys/class/net/eth0/ifindex");
    wait_for(|| index.exists());
    let index = fs::read_to_string(index).map_err(|error| failed("find eth0", error))?;
    let index = index.trim().parse().map_err(|_| format!("eth0 has the strange index {index}"))?;
    netlink::add_address(index, address.ip, address.prefix)
        .map_err(|error| failed("set eth0's address", error))?;
    netlink::up(index).map_err(|error| failed("switch eth0 on", error))
}

/// Fills no more memory than the machine has: init killed for want of memory would tell nobody why.
fn limit_memory(config: &mut Config) -> Option<String> {
    let available_mib = available_memory_mib(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let fits_mib = available_mib.saturating_sub(MEMORY_LEFT_MIB);
    if config.memory_mib <= fits_mib {
        return None;
    }
    let error = format!(
        "witness.memory={} does not fit: {fits_mib} MiB are filled instead",
        config.memory_mib
    );
    config.memory_mib = fits_mib;
    Some(error)
}

fn available_memory_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

/// A disk on the PCI bus has its node some time after its module is loaded.
fn wait_for_disk() {
    let has_disk = fs::read_dir("/sys/bus/virtio/drivers/virtio_blk").is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))
    });
    if has_disk {
        wait_for(|| Path::new("/dev/vda").exists());
    }
}

fn wait_for(happened: impl Fn() -> bool) {
    let began = Instant::now();
    while !happened() && began.elapsed() < DEVICE_WAIT {
        thread::sleep(DEVICE_POLL);
    }
}

/// A thread of the witness that panics is an error like any other, not silence.
fn report_panics(witness: &Arc<Witness>, console: &Arc<Console>) {
    let (witness, console) = (Arc::clone(witness), Arc::clone(console));
    panic::set_hook(Box::new(move |panic| {
        console.say(&format!("witness: {panic}"));
        witness.add_error(format!("the witness itself failed: {panic}"));
    }));
}

fn watch_power_button(witness: &Arc<Witness>) {
    for mut device in power::input_devices() {
        witness.spawn(move |witness| {
            if let Err(error) = power::wait_for_button(&mut device).and_then(|()| power::off()) {
                witness.add_error(format!("the power button does not work: {error}"));
            }
        });
    }
}

fn serve(witness: &Arc<Witness>, console: &Console) {
    match control::listener() {
        Ok(listener) => witness.spawn(move |witness| control::keep_serving(witness, &listener)),
        Err(error) => console.say(&format!("witness: the control port cannot be opened: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_available_memory() {
        let meminfo = "MemTotal:        1000000 kB\nMemFree:  5 kB\nMemAvailable:     524288 kB\n";
        assert_eq!(available_memory_mib(meminfo), Some(512));
        assert_eq!(available_memory_mib("MemTotal: 1 kB\n"), None);
    }
}

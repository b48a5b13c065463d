//! Ends the machine: off, restarted or crashed, by command or by its power button.

use std::fs::{self, File};
use std::io::{self, Read};

use rustix::system::RebootCommand;

/// The kernel's input devices; the power button is one of the first.
const INPUT_DEVICES: &str = "/dev/input";
/// struct input_event on 64-bit machines: two 8-byte times, then type, code and value.
const EVENT_BYTES: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Switches the machine off; returns only if the kernel refuses.
pub(crate) fn off() -> io::Result<()> {
    rustix::fs::sync();
    Ok(rustix::system::reboot(RebootCommand::PowerOff)?)
}

/// Restarts the machine; returns only if the kernel refuses.
pub(crate) fn restart() -> io::Result<()> {
    rustix::fs::sync();
    Ok(rustix::system::reboot(RebootCommand::Restart)?)
}

/// Crashes the kernel; returns only if it refuses.
pub(crate) fn crash() -> io::Result<()> {
    fs::write("/proc/sysrq-trigger", "c")
}

/// The input devices whose events [`wait_for_button`] understands.
pub(crate) fn input_devices() -> Vec<File> {
    let Ok(entries) = fs::read_dir(INPUT_DEVICES) else { return Vec::new() };
    entries.flatten().filter_map(|entry| File::open(entry.path()).ok()).collect()
}

/// Returns when the power button is pressed on this device; an error if the device goes away.
pub(crate) fn wait_for_button(device: &mut File) -> io::Result<()> {
    let mut event = [0; EVENT_BYTES];
    loop {
        device.read_exact(&mut event)?;
        if is_power_button(&event) {
            return Ok(());
        }
    }
}

fn is_power_button(event: &[u8; EVENT_BYTES]) -> bool {
    let half = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    half(16) == EV_KEY && half(18) == KEY_POWER && event[20] == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_press_of_the_power_button_counts() {
        let event = |kind: u16, code: u16, value: u8| {
            let mut event = [0xaa; EVENT_BYTES];
            event[16..18].copy_from_slice(&kind.to_ne_bytes());
            event[18..20].copy_from_slice(&code.to_ne_bytes());
            event[20..].copy_from_slice(&[value, 0, 0, 0]);
            event
        };
        assert!(is_power_button(&event(EV_KEY, KEY_POWER, 1)));
        assert!(!is_power_button(&event(EV_KEY, KEY_POWER, 0)), "released");
        assert!(!is_power_button(&event(EV_KEY, 30, 1)));
        assert!(!is_power_button(&event(0, KEY_POWER, 1)));
    }
}

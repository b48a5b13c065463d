//! Opens a tap: the one place of the agent with `unsafe` in it.
//!
//! A tap can only be made by the `TUNSETIFF` ioctl on `/dev/net/tun` (netlink refuses the kind `tun`), and no crate that
//! we build on offers that call as a safe function. What is unsafe about it is stated where it is used.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

use super::INTERFACE_NAME_BYTES_MAX;

const DEVICE: &str = "/dev/net/tun";

/// `_IOW('T', 202, int)` (linux/if_tun.h); the kernel takes a `struct ifreq` all the same.
const TUNSETIFF: Opcode = 0x4004_54ca;
/// A tap, that is, with Ethernet headers.
const IFF_TAP: u16 = 0x0002;
/// Without four bytes of packet information in front of each packet.
const IFF_NO_PI: u16 = 0x1000;
/// With a virtio-net header in front of each packet, as QEMU wants it for offloads.
const IFF_VNET_HDR: u16 = 0x4000;

/// Bytes of `struct ifreq` on 64-bit Linux: the name (16) and a union (24).
const IFREQ_BYTES: usize = 40;
/// Where the flags stand in it.
const FLAGS_OFFSET: usize = 16;

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is too long.
    #[error("the name has more than {INTERFACE_NAME_BYTES_MAX} bytes")]
    Name,
    /// The device cannot be opened.
    #[error("cannot open {DEVICE}")]
    Open(#[source] io::Error),
    /// The kernel refused; `EBUSY` means that somebody still holds a tap of that name.
    #[error("the kernel refused TUNSETIFF")]
    Refused(#[source] io::Error),
}

/// Makes a tap that lives as long as the descriptor.
pub(super) fn open(name: &str) -> Result<OwnedFd, TapError> {
    let mut request = [0_u8; IFREQ_BYTES];
    let bytes = name.as_bytes();
    if bytes.len() > INTERFACE_NAME_BYTES_MAX {
        return Err(TapError::Name);
    }
    request[..bytes.len()].copy_from_slice(bytes);
    let flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR).to_ne_bytes();
    request[FLAGS_OFFSET..FLAGS_OFFSET + flags.len()].copy_from_slice(&flags);

    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nonblocking)
        .open(DEVICE)
        .map_err(TapError::Open)?;
    // SAFETY: `SetInterface` describes TUNSETIFF truly, see its implementation.
    unsafe { ioctl(&device, SetInterface(request)) }
        .map_err(|error| TapError::Refused(error.into()))?;
    Ok(device.into())
}

/// The call TUNSETIFF with its `struct ifreq`.
struct SetInterface([u8; IFREQ_BYTES]);

// SAFETY: TUNSETIFF reads one `struct ifreq` (40 bytes on 64-bit Linux) from the pointer and writes the interface's name
// back into it; it keeps no pointer. `as_ptr` points to 40 bytes that live as long as the call and are ours to change.
// Alignment: the kernel copies with `copy_from_user`, which takes any address.
unsafe impl Ioctl for SetInterface {
    type Output = ();

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        TUNSETIFF
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.0.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<Self::Output> {
        Ok(())
    }
}

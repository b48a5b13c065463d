//! Brings a network interface up and gives it an address, with the two rtnetlink messages that this takes.
//!
//! Written out by hand because the guest has no `ip` and no other use for a netlink library; the layouts are those of
//! rtnetlink(7). Called once, by [`crate::boot`].

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const NLM_F_REQUEST: u16 = 0x01;
const NLM_F_ACK: u16 = 0x04;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const AF_INET: u8 = 2;
const IFA_LOCAL: u16 = 2;
const IFF_UP: u32 = 1;
const HEADER_BYTES: usize = 16;

/// Switches an interface on.
pub(crate) fn up(interface: u32) -> io::Result<()> {
    request(RTM_NEWLINK, 0, &link_up(interface))
}

/// Gives an interface an IPv4 address.
pub(crate) fn add_address(interface: u32, ip: Ipv4Addr, prefix: u8) -> io::Result<()> {
    request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &address(interface, ip, prefix))
}

/// struct ifinfomsg: family, padding, type, index, flags, mask of the flags to change.
fn link_up(interface: u32) -> Vec<u8> {
    let mut body = vec![0, 0, 0, 0];
    for field in [interface, IFF_UP, IFF_UP] {
        body.extend(field.to_ne_bytes());
    }
    body
}

/// struct ifaddrmsg: family, prefix length, flags, scope, index; then the address as an attribute.
fn address(interface: u32, ip: Ipv4Addr, prefix: u8) -> Vec<u8> {
    let mut body = vec![AF_INET, prefix, 0, 0];
    body.extend(interface.to_ne_bytes());
    body.extend(8_u16.to_ne_bytes());
    body.extend(IFA_LOCAL.to_ne_bytes());
    body.extend(ip.octets());
    body
}

/// struct nlmsghdr: length, type, flags, sequence, port; then the body.
fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
    message.extend(((HEADER_BYTES + body.len()) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

fn request(kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    // NETLINK_ROUTE is protocol 0, which is what no protocol means.
    let socket: OwnedFd =
        socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    // A netlink socket that is not connected sends to the kernel.
    send(&socket, &message(kind, flags, body), SendFlags::empty())?;
    let mut answer = [0; 1024];
    let (length, _) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
    outcome(&answer[..length])
}

/// Reads the kernel's acknowledgement: an error message, whose code is 0 when all is well.
fn outcome(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let code = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(-code)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_kernels_layout() {
        assert_eq!(link_up(2).len(), 16);
        let body = address(2, Ipv4Addr::new(198, 19, 0, 101), 24);
        assert_eq!(body.len(), 16);
        let message = message(RTM_NEWADDR, NLM_F_CREATE, &body);
        assert_eq!(message[..4], 32_u32.to_ne_bytes());
        assert_eq!(message[28..], [198, 19, 0, 101]);
    }

    #[test]
    fn the_kernel_answers_a_request_for_an_interface_that_is_not_there() {
        let error = up(u32::MAX >> 1).unwrap_err();
        // ENODEV as root, EPERM as anybody else: either way, understood.
        assert!(matches!(error.raw_os_error(), Some(19 | 1)), "{error}");
    }
}

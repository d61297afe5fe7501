//! A socket for whole frames of one network interface.
#![allow(unsafe_code)]

use anyhow::{Context, Result};
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send,
    socket_with,
};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::ptr;
use std::time::Duration;

/// `struct sockaddr_ll` (`include/uapi/linux/if_packet.h`).
#[repr(C)]
struct Address {
    family: u16,
    /// In network byte order.
    protocol: u16,
    interface: i32,
    hardware: u16,
    packet: u8,
    length: u8,
    address: [u8; 8],
}

// SAFETY: the pointer is to a whole sockaddr_ll, which lives as long as the call.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(
        &self,
        f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        f(ptr::from_ref(self).cast(), size_of::<Self>() as u32)
    }
}

/// A socket that sends and receives frames of one protocol.
#[derive(Debug)]
pub(crate) struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Opens one on the interface with this index; `limit` is that of each send and receive.
    pub(crate) fn open(interface: i32, protocol: u16, limit: Duration) -> Result<Self> {
        let wire = protocol.to_be();
        let socket = socket_with(
            AddressFamily::PACKET,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            NonZeroU32::new(u32::from(wire)).map(Protocol::from_raw),
        )
        .context("packet socket")?;
        set_socket_timeout(&socket, Timeout::Recv, Some(limit)).context("packet socket")?;
        set_socket_timeout(&socket, Timeout::Send, Some(limit)).context("packet socket")?;
        let address = Address {
            family: AddressFamily::PACKET.as_raw(),
            protocol: wire,
            interface,
            hardware: 0,
            packet: 0,
            length: 0,
            address: [0; 8],
        };
        bind(&socket, &address).context("bind a packet socket")?;
        Ok(Self(socket))
    }

    /// Sends a frame.
    pub(crate) fn send(&self, frame: &[u8]) -> rustix::io::Result<usize> {
        send(&self.0, frame, SendFlags::empty())
    }

    /// Receives a frame and gives its length; a longer one is cut.
    pub(crate) fn receive(&self, frame: &mut [u8]) -> rustix::io::Result<usize> {
        Ok(recv(&self.0, frame, RecvFlags::empty())?.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn the_address_has_the_kernel_s_layout() {
        assert_eq!(size_of::<Address>(), 20);
        assert_eq!(offset_of!(Address, interface), 4);
        assert_eq!(offset_of!(Address, address), 12);
    }
}

//! Listening sockets that this process did not bind: the predecessor's, or the service manager's.
//!
//! Each is known by the address it is bound to, so that the order does not matter and a configuration
//! may name others than the process before it had.

use std::fmt;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context as _, bail};
use listenfd::ListenFd;
use socket2::{Domain, SockRef};

use crate::admin;
use crate::config::{AdminListen, HttpConfig};

#[derive(Debug, Default)]
pub(super) struct Inherited {
    tcp: Vec<TcpListener>,
    unix: Vec<UnixListener>,
}

impl Inherited {
    /// What the service manager listens on in this process's name (sd_listen_fds(3)). To be called
    /// before there are threads.
    ///
    /// # Errors
    /// One of them is not a stream socket that listens.
    pub(super) fn from_service_manager() -> anyhow::Result<Inherited> {
        let mut descriptors = ListenFd::from_env();
        let mut inherited = Inherited::default();
        for index in 0..descriptors.len() {
            let what = || {
                format!(
                    "LISTEN_FDS: descriptor {} is no listening socket",
                    index + 3
                )
            };
            match descriptors.take_tcp_listener(index) {
                Ok(socket) => inherited.tcp.extend(socket),
                Err(_) => {
                    let socket = descriptors.take_unix_listener(index).with_context(what)?;
                    inherited.unix.extend(socket);
                }
            }
        }
        for socket in &inherited.tcp {
            if !SockRef::from(socket).is_listener()? {
                bail!("LISTEN_FDS: {} does not listen", socket.local_addr()?);
            }
        }
        Ok(inherited)
    }

    /// # Errors
    /// One of them is no socket.
    pub(super) fn new(descriptors: Vec<OwnedFd>) -> anyhow::Result<Inherited> {
        let mut inherited = Inherited::default();
        for descriptor in descriptors {
            match SockRef::from(&descriptor).domain()? {
                Domain::UNIX => inherited.unix.push(descriptor.into()),
                _ => inherited.tcp.push(descriptor.into()),
            }
        }
        Ok(inherited)
    }

    /// The sockets of layer 7.
    pub(super) fn take_http(&mut self, config: &HttpConfig) -> Vec<TcpListener> {
        let is_http = |socket: &mut TcpListener| {
            let address = socket.local_addr().ok();
            let mut wanted = config.listen.iter().chain(&config.tls.listen);
            wanted.any(|wanted| Some(*wanted) == address)
        };
        self.tcp.extract_if(.., is_http).collect()
    }

    pub(super) fn take_admin(&mut self, wanted: &AdminListen) -> Option<admin::Listener> {
        match wanted {
            AdminListen::Tcp(address) => {
                let is_admin =
                    |socket: &TcpListener| socket.local_addr().is_ok_and(|it| it == *address);
                let index = self.tcp.iter().position(is_admin)?;
                Some(admin::Listener::Tcp(self.tcp.swap_remove(index)))
            }
            AdminListen::Unix(path) => self.take_unix(path).map(admin::Listener::Unix),
        }
    }

    pub(super) fn take_unix(&mut self, path: &Path) -> Option<UnixListener> {
        let is_wanted = |socket: &UnixListener| {
            let address = socket.local_addr();
            address.is_ok_and(|address| address.as_pathname() == Some(path))
        };
        let index = self.unix.iter().position(is_wanted)?;
        Some(self.unix.swap_remove(index))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tcp.is_empty() && self.unix.is_empty()
    }
}

impl fmt::Display for Inherited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tcp = self.tcp.iter().filter_map(|it| it.local_addr().ok());
        let unix = self.unix.iter().filter_map(|it| it.local_addr().ok());
        let unix = unix.map(|address| match address.as_pathname() {
            Some(path) => format!("unix:{}", path.display()),
            None => "unix:".to_owned(),
        });
        let names: Vec<String> = tcp.map(|it| it.to_string()).chain(unix).collect();
        f.write_str(&names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_known_by_their_addresses() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (http, tls, other) = (bind(), bind(), bind());
        let mut config = HttpConfig {
            listen: vec![http.local_addr().unwrap()],
            ..HttpConfig::default()
        };
        config.tls.listen = vec![tls.local_addr().unwrap()];
        let left = other.local_addr().unwrap().to_string();
        let unix = UnixListener::bind(&path).unwrap();

        let descriptors = vec![other.into(), unix.into(), tls.into(), http.into()];
        let mut inherited = Inherited::new(descriptors).unwrap();
        assert_eq!(inherited.take_http(&config).len(), 2);
        let elsewhere = AdminListen::Unix(folder.path().join("other.sock"));
        assert!(inherited.take_admin(&elsewhere).is_none());
        assert!(matches!(
            inherited.take_admin(&AdminListen::Unix(path)),
            Some(admin::Listener::Unix(_))
        ));
        assert_eq!(inherited.to_string(), left);
    }
}

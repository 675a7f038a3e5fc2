//! Puts the packet program on interfaces, and keeps it there.
//!
//! [`choose`] decides how by what kind of device it is; `links` does it. An agent that starts puts its
//! own program into the pinned links it finds, which the kernel swaps between two packets. [`Datapath::follow_interfaces`] brings the links in line with the interfaces that there
//! are: at the start, and whenever rtnetlink tells of a change.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, bail};

use super::Datapath;
use super::links::{Held, release};
use crate::config::Attach;
use crate::l4::interface::Interface;
use crate::l4::pins::{self, LinkPin};

/// How long the kernel may take to let go of a device once the last reference to a link is gone.
const RELEASE_PATIENCE: Duration = Duration::from_secs(1);

/// Where in the kernel the program sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// XDP in the driver.
    Native,
    /// XDP on socket buffers: several times as costly.
    Generic,
    /// A link at tc's ingress (Linux 6.6).
    Tcx,
    /// A filter of the clsact queueing discipline, where the kernel has no tcx.
    Clsact,
    /// The same two where packets go out, for health checks.
    TcxEgress,
    ClsactEgress,
}

impl Hook {
    fn is_xdp(self) -> bool {
        matches!(self, Hook::Native | Hook::Generic)
    }

    pub(super) fn is_egress(self) -> bool {
        matches!(self, Hook::TcxEgress | Hook::ClsactEgress)
    }
}

/// How the program came to sit on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    pub hook: Hook,
    /// Of the device: that of the interface, or of the one below a VLAN.
    pub ifindex: u32,
    /// An earlier agent's, with this agent's program in it.
    pub adopted: bool,
}

/// The hooks to try on a kind of device, the best one first, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub hooks: &'static [Hook],
    pub reason: &'static str,
}

/// What `l4.attach` amounts to on a device.
pub fn choose(attach: Attach, device: &Interface) -> Choice {
    match attach {
        Attach::Native => Choice {
            hooks: &[Hook::Native],
            reason: "configured",
        },
        Attach::Generic => Choice {
            hooks: &[Hook::Generic],
            reason: "configured",
        },
        Attach::Tcx => Choice {
            hooks: &[Hook::Tcx, Hook::Clsact],
            reason: "configured",
        },
        Attach::Auto => match device.kind.as_deref() {
            _ if device.loopback => SOCKET_BUFFERS,
            None | Some("bond" | "team" | "dsa") => Choice {
                hooks: &[Hook::Native, Hook::Generic],
                reason: "a network card: its frames are whole",
            },
            Some(_) => SOCKET_BUFFERS,
        },
    }
}

const SOCKET_BUFFERS: Choice = Choice {
    hooks: &[Hook::Tcx, Hook::Clsact, Hook::Generic],
    reason: "a device of software: frames of this host may lack checksums and be large \
             (native XDP would lose the mark that says so)",
};

/// The links of this process, and which device each configured interface was.
#[derive(Default)]
pub(super) struct Attachments {
    /// Held while nothing is pinned: dropping a link detaches it.
    pub(super) held: Vec<Held>,
    attached: BTreeMap<String, Attached>,
    /// Interfaces that are there, but that the kernel refused.
    refused: BTreeSet<String>,
    /// Whether health checks go out to the VIPs themselves,
    probing: bool,
    /// and the devices, by index, where the program for that sits.
    probed: BTreeSet<u32>,
}

impl Datapath {
    /// Attaches to every one of these interfaces, and then detaches from all others, and from other
    /// hooks, where an earlier agent may have left its program.
    ///
    /// # Errors
    /// Names the interface that is not there or that the kernel refuses.
    pub fn attach_all(&mut self, interfaces: &[String], mode: Attach) -> anyhow::Result<()> {
        for interface in interfaces {
            self.attach(interface, mode)
                .with_context(|| format!("l4.interfaces: {interface}"))?;
        }
        self.release_others()
    }

    /// Attaches to an interface, or takes over the link an earlier agent pinned.
    pub fn attach(&mut self, interface: &str, mode: Attach) -> anyhow::Result<Attached> {
        let device = device_of(interface, mode)?;
        let choice = choose(mode, &device);
        let attached = self.attach_device(&device, choice.hooks)?;
        tracing::info!(
            interface,
            device = device.name,
            hook = %attached.hook,
            adopted = attached.adopted,
            reason = choice.reason,
            "attached"
        );
        self.attachments
            .attached
            .insert(interface.to_owned(), attached);
        if self.attachments.probing {
            self.attach_probe(device.index);
        }
        Ok(attached)
    }

    /// Attaches to interfaces that came or were replaced, and lets go of what is gone. Called
    /// whenever an interface came, went, or has another name.
    pub fn follow_interfaces(&mut self, interfaces: &[String], mode: Attach) {
        for interface in interfaces {
            let before = self.attachments.attached.get(interface).copied();
            let device = device_of(interface, mode).ok();
            match (before, device) {
                (Some(before), Some(device)) if before.ifindex == device.index => {}
                (_, Some(_)) => {
                    if let Err(error) = self.attach(interface, mode) {
                        self.attachments.attached.remove(interface);
                        // Told once, tried with every tick.
                        if self.attachments.refused.insert(interface.clone()) {
                            tracing::error!(interface, "not attached: {error:#}; trying on");
                        }
                    } else {
                        self.attachments.refused.remove(interface);
                    }
                }
                (Some(_), None) => {
                    tracing::warn!(
                        interface,
                        "the interface is gone; waiting for it to come back"
                    );
                    self.attachments.attached.remove(interface);
                }
                (None, None) => {
                    self.attachments.refused.remove(interface);
                }
            }
        }
        if let Err(error) = self.release_others() {
            tracing::error!("let go of an interface: {error:#}");
        }
    }

    /// Has health checks sent to the backends that they are for where interfaces are attached to, and
    /// where they will be. True if that is so at all of them.
    pub fn probe(&mut self) -> bool {
        let attachments = &mut self.attachments;
        let begins = !std::mem::replace(&mut attachments.probing, true);
        let attached = attachments.attached.values();
        let devices: BTreeSet<u32> = attached.map(|attached| attached.ifindex).collect();
        if begins {
            for index in &devices {
                self.attach_probe(*index);
            }
        }
        devices.is_subset(&self.attachments.probed)
    }

    /// Whether there is an interface to attach to that the kernel refused so far.
    pub fn is_refused(&self) -> bool {
        !self.attachments.refused.is_empty()
    }

    /// Releases the pinned links of devices that no configured interface is, and of hooks that others
    /// took over from.
    ///
    /// Two hooks of one device do no harm: whom the first forwards, the second never sees. But while
    /// clsact comes or goes, a device drops what is sent to it by way of its queue (kernel:
    /// net/sched/sch_api.c, `qdisc_graft`), as classifiers send and XDP does not. So XDP must be on all
    /// devices before clsact is taken off the first, and still be there when it is put on the last.
    fn release_others(&self) -> anyhow::Result<()> {
        let Some(path) = &self.pin_path else {
            return Ok(());
        };
        for pin in pins::links(path)? {
            let mut attached = self.attachments.attached.values();
            let wanted = attached.any(|attached| {
                let same_hook = match pin.hook.is_egress() {
                    true => self.attachments.probing,
                    false => attached.hook == pin.hook,
                };
                attached.ifindex == pin.ifindex && same_hook
            });
            if !wanted {
                release(&pin)?;
                tracing::info!(link = %pin.path.display(), "detached");
            }
        }
        Ok(())
    }

    /// Without it, checks go to backends' own addresses.
    fn attach_probe(&mut self, index: u32) {
        let attached = Interface::indexed(index)
            .and_then(|device| self.attach_device(&device, &[Hook::TcxEgress, Hook::ClsactEgress]));
        match attached {
            Ok(_) => {
                self.attachments.probed.insert(index);
            }
            Err(error) => {
                self.attachments.probed.remove(&index);
                tracing::warn!("health checks do not go to VIPs themselves: {error:#}");
            }
        }
    }

    fn attach_device(&mut self, device: &Interface, hooks: &[Hook]) -> anyhow::Result<Attached> {
        let pinned = self.pins_of(device, hooks)?;
        let released = self.make_way(device, hooks, &pinned)?;
        // The kernel may take a moment to let go.
        let patience = if released {
            RELEASE_PATIENCE
        } else {
            Duration::ZERO
        };
        let mut refused = Vec::new();
        for &hook in hooks {
            let pin = pinned.iter().find(|pin| pin.hook == hook);
            let adopted = pin.is_some_and(|pin| self.adopted(device, pin));
            if !adopted && let Err(error) = self.attach_new(device, hook, patience) {
                tracing::debug!(device = device.name, %hook, "refused: {error:#}");
                refused.push(format!("{hook}: {error:#}"));
                continue;
            }
            if !refused.is_empty() && hook == Hook::Generic {
                let refused = refused.join("; ");
                tracing::warn!(
                    device = device.name,
                    refused,
                    "generic XDP, several times as costly"
                );
            }
            return Ok(Attached {
                hook,
                ifindex: device.index,
                adopted,
            });
        }
        bail!("attach to {}: {}", device.name, refused.join("; "))
    }

    /// Makes way for another mode of XDP, of which a device takes one at a time: the classifier
    /// carries the packets in between. True if something was released.
    fn make_way(
        &mut self,
        device: &Interface,
        hooks: &[Hook],
        pinned: &[LinkPin],
    ) -> anyhow::Result<bool> {
        let Some(old) = pinned.iter().find(|pin| pin.hook.is_xdp()) else {
            return Ok(false);
        };
        if !hooks[0].is_xdp() || hooks.contains(&old.hook) {
            return Ok(false);
        }
        let carried = [Hook::Tcx, Hook::Clsact].into_iter().any(|hook| {
            pinned.iter().any(|pin| pin.hook == hook)
                || self.attach_new(device, hook, Duration::ZERO).is_ok()
        });
        if !carried {
            tracing::warn!(
                device = device.name,
                "packets pass by until XDP is attached anew"
            );
        }
        release(old)?;
        Ok(true)
    }

    /// Of a device, on the side that these hooks are on.
    fn pins_of(&self, device: &Interface, hooks: &[Hook]) -> anyhow::Result<Vec<LinkPin>> {
        let Some(path) = &self.pin_path else {
            return Ok(Vec::new());
        };
        let egress = hooks[0].is_egress();
        let mut pins = pins::links(path)?;
        pins.retain(|pin| pin.ifindex == device.index && pin.hook.is_egress() == egress);
        Ok(pins)
    }
}

/// The device to attach to: below a VLAN's is the one whose frames have the tag, which the programs
/// read themselves, unless a classifier is asked for.
pub fn device_of(interface: &str, mode: Attach) -> anyhow::Result<Interface> {
    let mut device = Interface::named(interface)?;
    while mode != Attach::Tcx && device.kind.as_deref() == Some("vlan") {
        let lower = device
            .lower
            .context("a VLAN of another namespace's device")?;
        device = Interface::indexed(lower)?;
    }
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(attach: Attach, kind: Option<&str>) -> &'static [Hook] {
        let device = Interface {
            kind: kind.map(str::to_owned),
            ..Interface::default()
        };
        choose(attach, &device).hooks
    }

    #[test]
    fn auto_takes_xdp_on_cards_and_the_classifier_on_devices_of_software() {
        for card in [None, Some("bond")] {
            assert_eq!(hooks(Attach::Auto, card), [Hook::Native, Hook::Generic]);
        }
        for kind in [
            "veth",
            "bridge",
            "tun",
            "vxlan",
            "wireguard",
            "ipip",
            "netkit",
        ] {
            assert_eq!(hooks(Attach::Auto, Some(kind))[0], Hook::Tcx, "{kind}");
        }
        let lo = Interface {
            loopback: true,
            ..Interface::default()
        };
        assert_eq!(choose(Attach::Auto, &lo).hooks[0], Hook::Tcx);
    }

    #[test]
    fn what_is_configured_is_taken_on_every_device() {
        for kind in [None, Some("veth")] {
            assert_eq!(hooks(Attach::Native, kind), [Hook::Native]);
            assert_eq!(hooks(Attach::Generic, kind), [Hook::Generic]);
            assert_eq!(hooks(Attach::Tcx, kind), [Hook::Tcx, Hook::Clsact]);
        }
    }
}

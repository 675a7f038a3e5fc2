//! Puts the packet program on one device by one hook, takes over a pinned link, and lets go of one.
//!
//! For `attach`, which decides where. Links are pinned; the filter that stands in for a link where the
//! kernel has no tcx outlives the process by itself, and its program is pinned to note that it is ours.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{
    self, NlOptions, SchedClassifierLink, TcAttachOptions, TcAttachType, TcHandle,
};
use aya::programs::xdp::{XdpLink, XdpMode};

use super::attach::Hook;
use super::{Datapath, programs};
use crate::l4::clsact;
use crate::l4::interface::Interface;
use crate::l4::pins::LinkPin;

/// Of our filter where links are not to be had; by these it is found again. Lower priorities run
/// first, and the kernel gives out handles from 1.
const FILTER_PRIORITY: u16 = 1;
const FILTER_HANDLE: TcHandle = TcHandle::new(0x7664, 1);
#[expect(
    dead_code,
    reason = "held, never looked at: dropping a link detaches it"
)]
pub(super) enum Held {
    Xdp(XdpLink),
    Classifier(SchedClassifierLink),
}

impl Datapath {
    /// Puts this agent's program into a pinned link; the kernel swaps it between two packets. A link
    /// that is of no use is removed.
    pub(super) fn adopted(&mut self, device: &Interface, pin: &LinkPin) -> bool {
        let done = match pin.hook {
            Hook::Native | Hook::Generic => self.adopt_xdp(pin),
            Hook::Tcx | Hook::TcxEgress => self.adopt_tcx(pin),
            Hook::Clsact | Hook::ClsactEgress => self.adopt_filter(device, pin),
        };
        // Its device is gone and another has its index, or somebody removed the filter.
        let Err(error) = done else { return true };
        tracing::info!(link = %pin.path.display(), "the pinned link is of no use: {error:#}");
        if let Err(error) = fs::remove_file(&pin.path) {
            tracing::warn!("remove {}: {error}", pin.path.display());
        }
        false
    }

    fn adopt_xdp(&mut self, pin: &LinkPin) -> anyhow::Result<()> {
        let link: FdLink = PinnedLink::from_pin(&pin.path).context("open")?.into();
        let link = XdpLink::try_from(link).context("not an XDP link")?;
        let program = programs::xdp(&mut self.ebpf, programs::PACKETS)?;
        let id = program
            .attach_to_link(link)
            .context("replace its program")?;
        // The pin keeps it; this handle may go.
        drop(program.take_link(id)?);
        Ok(())
    }

    fn adopt_tcx(&mut self, pin: &LinkPin) -> anyhow::Result<()> {
        let link: FdLink = PinnedLink::from_pin(&pin.path).context("open")?.into();
        let link = SchedClassifierLink::try_from(link).context("not a tcx link")?;
        let program = programs::classifier(&mut self.ebpf, classifier_of(pin.hook))?;
        let id = program
            .attach_to_link(link)
            .context("replace its program")?;
        drop(program.take_link(id)?);
        Ok(())
    }

    fn adopt_filter(&mut self, device: &Interface, pin: &LinkPin) -> anyhow::Result<()> {
        let link = filter_on(&device.name, pin.hook)?;
        let program = programs::classifier(&mut self.ebpf, classifier_of(pin.hook))?;
        let id = program
            .attach_to_link(link)
            .context("replace its program")?;
        // Dropped, it would remove the filter.
        std::mem::forget(program.take_link(id)?);
        fs::remove_file(&pin.path).with_context(|| format!("remove {}", pin.path.display()))?;
        program.pin(&pin.path).context("pin the program")
    }

    pub(super) fn attach_new(
        &mut self,
        device: &Interface,
        hook: Hook,
        patience: Duration,
    ) -> anyhow::Result<()> {
        let pin = self
            .pin_path
            .as_ref()
            .map(|path| LinkPin::new(path, &device.name, device.index, hook));
        match hook {
            Hook::Native => self.attach_xdp(device, XdpMode::Driver, patience, pin),
            Hook::Generic => self.attach_xdp(device, XdpMode::Skb, patience, pin),
            Hook::Tcx | Hook::TcxEgress => self.attach_tcx(device, hook, pin),
            Hook::Clsact | Hook::ClsactEgress => self.attach_filter(device, hook, pin),
        }
    }

    fn attach_xdp(
        &mut self,
        device: &Interface,
        mode: XdpMode,
        patience: Duration,
        pin: Option<LinkPin>,
    ) -> anyhow::Result<()> {
        let program = programs::xdp(&mut self.ebpf, programs::PACKETS)?;
        let begun = Instant::now();
        let id = loop {
            match program.attach_to_if_index(device.index, mode) {
                Ok(id) => break id,
                Err(error) if is_busy(&error) && begun.elapsed() < patience => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(error.into()),
            }
        };
        let link = program.take_link(id)?;
        match pin {
            Some(pin) => keep(link.try_into().context("no link to pin")?, &pin)?,
            None => self.attachments.held.push(Held::Xdp(link)),
        }
        Ok(())
    }

    fn attach_tcx(
        &mut self,
        device: &Interface,
        hook: Hook,
        pin: Option<LinkPin>,
    ) -> anyhow::Result<()> {
        let program = programs::classifier(&mut self.ebpf, classifier_of(hook))?;
        let id = program.attach_with_options(
            &device.name,
            side_of(hook),
            TcAttachOptions::TcxOrder(LinkOrder::default()),
        )?;
        let link = program.take_link(id)?;
        match pin {
            Some(pin) => keep(link.try_into().context("no link to pin")?, &pin)?,
            None => self.attachments.held.push(Held::Classifier(link)),
        }
        Ok(())
    }

    /// The filter outlives the process by itself; pinning the program notes that it is ours.
    fn attach_filter(
        &mut self,
        device: &Interface,
        hook: Hook,
        pin: Option<LinkPin>,
    ) -> anyhow::Result<()> {
        let program = programs::classifier(&mut self.ebpf, classifier_of(hook))?;
        // There may be one already; the filter tells whether there is.
        let qdisc = tc::qdisc_add_clsact(&device.name);
        let filter = NlOptions {
            priority: FILTER_PRIORITY,
            handle: FILTER_HANDLE,
            classid: None,
        };
        let attached = program.attach_with_options(
            &device.name,
            side_of(hook),
            TcAttachOptions::Netlink(filter),
        );
        let id = match (attached, qdisc) {
            (Ok(id), _) => id,
            (Err(error), Ok(())) => return Err(error.into()),
            (Err(error), Err(qdisc)) => bail!("{error}; add the clsact qdisc: {qdisc}"),
        };
        let link = program.take_link(id)?;
        match pin {
            Some(pin) => {
                std::mem::forget(link);
                program.pin(&pin.path).context("pin the program")?;
            }
            None => self.attachments.held.push(Held::Classifier(link)),
        }
        Ok(())
    }
}

/// Takes a program off its device: removes the filter if it is one, and the pin.
pub(in crate::l4) fn release(pin: &LinkPin) -> anyhow::Result<()> {
    if matches!(pin.hook, Hook::Clsact | Hook::ClsactEgress)
        && let Ok(device) = Interface::indexed(pin.ifindex)
    {
        // Dropped, it removes the filter, if nobody has yet.
        drop(filter_on(&device.name, pin.hook)?);
        if let Err(error) = clsact::remove_if_empty(device.index) {
            tracing::debug!(device = device.name, "clsact stays: {error:#}");
        }
    }
    // Unlike the file system, a descriptor lets go at once.
    let link = PinnedLink::from_pin(&pin.path);
    fs::remove_file(&pin.path).with_context(|| format!("remove {}", pin.path.display()))?;
    drop(link);
    Ok(())
}

fn keep(link: FdLink, pin: &LinkPin) -> anyhow::Result<()> {
    link.pin(&pin.path)
        .with_context(|| format!("pin {}", pin.path.display()))?;
    Ok(())
}

/// What sits at a hook that is a classifier's.
fn classifier_of(hook: Hook) -> &'static str {
    if hook.is_egress() {
        programs::PROBE
    } else {
        programs::PACKETS_TCX
    }
}

fn side_of(hook: Hook) -> TcAttachType {
    if hook.is_egress() {
        TcAttachType::Egress
    } else {
        TcAttachType::Ingress
    }
}

fn filter_on(interface: &str, hook: Hook) -> anyhow::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(
        interface,
        side_of(hook),
        FILTER_PRIORITY,
        FILTER_HANDLE,
        None,
    )
    .with_context(|| format!("find the filter on {interface}"))
}

/// The kernel's EBUSY, or EEXIST for the other mode.
fn is_busy(error: &aya::programs::ProgramError) -> bool {
    use nix::errno::Errno;

    let aya::programs::ProgramError::SyscallError(error) = error else {
        return false;
    };
    [Errno::EBUSY, Errno::EEXIST]
        .into_iter()
        .any(|errno| error.io_error.raw_os_error() == Some(errno as i32))
}

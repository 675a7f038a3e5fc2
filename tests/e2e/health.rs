//! Health checks that take a way of their own to a backend.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use router_tests::lab::Lab;
use tokio::sync::{mpsc, watch};
use viaduct::config::{Config, HealthCheck};
use viaduct::event::Event;
use viaduct::health::{self, Marks, Tunnels};
use viaduct::metrics::Metrics;
use viaduct::route::{Backend, Origin, Pool, Proto, Vip};
use viaduct::snapshot::{Published, Snapshot};

const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
const PATIENCE: Duration = Duration::from_secs(20);

/// Policy routing stands in for the datapath: packets to the VIP go to the backend their mark names.
#[test]
fn a_marked_check_goes_to_the_vip_on_its_own_backend() {
    let lab = Lab::new(2).unwrap();
    for (index, backend) in lab.backends.iter().enumerate() {
        let mark = index + 1;
        let via = lab.backend_address(index);
        backend
            .ip(&[&format!("address add {VIP}/32 dev lo")])
            .unwrap();
        lab.gateway
            .ip(&[
                &format!("rule add fwmark {mark} table {mark}"),
                &format!("route add {VIP} via {via} table {mark}"),
            ])
            .unwrap();
    }
    // The first serves the VIP and not its own address, the second the other way round.
    let serves = |index: usize, address: Ipv4Addr, port: u16| {
        lab.backends[index].run(|| TcpListener::bind((address, port)).unwrap())
    };
    let first = serves(0, VIP, 0);
    let port = first.local_addr().unwrap().port();
    let _second = serves(1, lab.backend_address(1), port);
    let backends: Vec<SocketAddr> = (0..2)
        .map(|index| (lab.backend_address(index), port).into())
        .collect();

    let direct = lab.gateway.run(|| down(&backends, port, Marks::new()));
    assert_eq!(direct, backends[0]);
    let vip = SocketAddr::from((VIP, port));
    let marks = backends
        .iter()
        .zip(1_u32..)
        .map(|(b, mark)| ((*b, vip), mark));
    let marks = marks.collect();
    let tunneled = lab.gateway.run(|| down(&backends, port, marks));
    assert_eq!(tunneled, backends[1]);
}

/// The backend of a VIP that checks find down, when both have been checked.
fn down(backends: &[SocketAddr], port: u16, marks: Marks) -> SocketAddr {
    let backends = backends.iter().copied();
    let pool = Pool {
        backends: backends
            .map(|address| Arc::new(Backend::new(address, Origin::Nats)))
            .collect(),
        balance: None,
        route_service_url: None,
    };
    let vip = Vip {
        proto: Proto::Tcp,
        address: VIP.into(),
        ports: viaduct::config::PortRange {
            first: port,
            last: port,
        },
    };
    let published = Published::default();
    published.store(Arc::new(Snapshot {
        revision: 1,
        vips: imbl::OrdMap::unit(vip, Arc::new(pool)),
        ..Snapshot::default()
    }));
    let mut config = Config::default();
    config.health.check = HealthCheck::Tcp;
    config.health.interval = Duration::from_millis(50);
    let tunnels = Tunnels::default();
    tunnels.store(Arc::new(marks));
    let metrics = Arc::<Metrics>::default();
    let (inbox, mut events) = mpsc::channel(8);
    let (_reload, config) = watch::channel(Arc::new(config));
    let (_reports, reported) = mpsc::channel(1);
    let checks = health::run(
        published,
        inbox,
        Arc::clone(&metrics),
        config,
        reported,
        tunnels,
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::spawn(checks);
        let told = async {
            let event = events.recv().await.unwrap();
            while metrics.probes_good.get() == 0 {
                tokio::task::yield_now().await;
            }
            event
        };
        match tokio::time::timeout(PATIENCE, told).await.unwrap() {
            Event::Health {
                backend,
                healthy: false,
            } => backend,
            other => panic!("{other:?}"),
        }
    })
}

//! The routes of one host, in the order in which the router tries them.

use std::cmp::Ordering;
use std::sync::Arc;

use crate::route::Pool;
use crate::route::conditions::Conditions;

/// The routes of one host, longest path first and equally long ones in byte order: the most specific
/// that matches is the first, and a path can be found by binary search.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoutes(Kept);

/// Most hosts have one route, and it stands in place.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kept {
    One(PlainRoute),
    /// Any other number; `None` are none.
    Several(Option<Arc<Several>>),
}

/// A route without conditions.
pub type PlainRoute = (Arc<str>, Arc<Pool>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Several {
    plain: Vec<PlainRoute>,
    /// Sorted as those are, of one path in the [order](Conditions::order) of their conditions.
    conditional: Vec<ConditionalRoute>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConditionalRoute {
    pub path: Arc<str>,
    pub conditions: Arc<Conditions>,
    pub pool: Arc<Pool>,
}

/// A route with or without conditions, as it is kept.
#[derive(Clone, Copy, Debug)]
pub struct HostRoute<'a> {
    pub path: &'a Arc<str>,
    pub conditions: Option<&'a Arc<Conditions>>,
    pub pool: &'a Arc<Pool>,
}

impl Default for HostRoutes {
    fn default() -> HostRoutes {
        HostRoutes(Kept::Several(None))
    }
}

impl HostRoutes {
    /// Those without conditions.
    pub fn paths(&self) -> &[PlainRoute] {
        match &self.0 {
            Kept::One(route) => std::slice::from_ref(route),
            Kept::Several(None) => &[],
            Kept::Several(Some(several)) => &several.plain,
        }
    }

    pub fn conditional(&self) -> &[ConditionalRoute] {
        match &self.0 {
            Kept::One(_) | Kept::Several(None) => &[],
            Kept::Several(Some(several)) => &several.conditional,
        }
    }

    /// How many, with and without conditions.
    pub fn count(&self) -> usize {
        self.paths().len() + self.conditional().len()
    }

    /// All routes, those with conditions first.
    pub fn iter(&self) -> impl Iterator<Item = HostRoute<'_>> {
        let conditional = self.conditional().iter().map(HostRoute::from);
        conditional.chain(self.paths().iter().map(HostRoute::from))
    }

    pub fn pools(&self) -> impl Iterator<Item = &Arc<Pool>> {
        self.iter().map(|route| route.pool)
    }

    pub fn get(&self, path: &str, conditions: Option<&Conditions>) -> Option<HostRoute<'_>> {
        match conditions {
            None => {
                let at = self.place(path).ok()?;
                Some(HostRoute::from(&self.paths()[at]))
            }
            Some(conditions) => {
                let at = self.conditional_place(path, conditions).ok()?;
                Some(HostRoute::from(&self.conditional()[at]))
            }
        }
    }

    pub fn get_mut(
        &mut self,
        path: &str,
        conditions: Option<&Conditions>,
    ) -> Option<&mut Arc<Pool>> {
        let at = match conditions {
            None => self.place(path).ok()?,
            Some(conditions) => self.conditional_place(path, conditions).ok()?,
        };
        Some(match (&mut self.0, conditions) {
            (Kept::One((_, pool)), _) => pool,
            (Kept::Several(several), None) => &mut Arc::make_mut(several.as_mut()?).plain[at].1,
            (Kept::Several(several), Some(_)) => {
                &mut Arc::make_mut(several.as_mut()?).conditional[at].pool
            }
        })
    }

    /// Adds a route, or replaces the pool of the one that is there.
    pub fn insert(&mut self, path: Arc<str>, conditions: Option<Arc<Conditions>>, pool: Arc<Pool>) {
        if let Some(known) = self.get_mut(&path, conditions.as_deref()) {
            *known = pool;
            return;
        }
        match conditions {
            None if self.count() == 0 => self.0 = Kept::One((path, pool)),
            None => {
                let at = self.place(&path).unwrap_or_else(|at| at);
                self.several_mut().plain.insert(at, (path, pool));
            }
            Some(conditions) => {
                let at = self.conditional_place(&path, &conditions);
                let route = ConditionalRoute {
                    path,
                    conditions,
                    pool,
                };
                let routes = &mut self.several_mut().conditional;
                routes.insert(at.unwrap_or_else(|at| at), route);
            }
        }
    }

    /// Removes a route; one that is not there is no error.
    pub fn remove(&mut self, path: &str, conditions: Option<&Conditions>) {
        let at = match conditions {
            None => self.place(path),
            Some(conditions) => self.conditional_place(path, conditions),
        };
        let Ok(at) = at else {
            return;
        };
        let several = self.several_mut();
        match conditions {
            None => drop(several.plain.remove(at)),
            Some(_) => drop(several.conditional.remove(at)),
        }
        if several.conditional.is_empty() && several.plain.len() <= 1 {
            let last = several.plain.pop();
            self.0 = last.map_or(Kept::Several(None), Kept::One);
        }
    }

    /// Whether both are one place in memory.
    pub(super) fn is(&self, other: &HostRoutes) -> bool {
        match (&self.0, &other.0) {
            (Kept::One((path, pool)), Kept::One((other_path, other))) => {
                Arc::ptr_eq(pool, other) && path == other_path
            }
            (Kept::Several(Some(several)), Kept::Several(Some(other))) => {
                Arc::ptr_eq(several, other)
            }
            (Kept::Several(None), Kept::Several(None)) => true,
            (Kept::One(_) | Kept::Several(_), _) => false,
        }
    }

    fn several_mut(&mut self) -> &mut Several {
        if let Kept::One(route) = &self.0 {
            let plain = vec![route.clone()];
            let conditional = Vec::new();
            self.0 = Kept::Several(Some(Arc::new(Several { plain, conditional })));
        }
        match &mut self.0 {
            Kept::Several(several) => Arc::make_mut(several.get_or_insert_default()),
            Kept::One(_) => unreachable!("it was made several"),
        }
    }

    /// Where a path is among those without conditions, or belongs.
    fn place(&self, path: &str) -> Result<usize, usize> {
        self.paths()
            .binary_search_by(|(known, _)| order(known, path))
    }

    fn conditional_place(&self, path: &str, conditions: &Conditions) -> Result<usize, usize> {
        self.conditional().binary_search_by(|known| {
            order(&known.path, path).then_with(|| known.conditions.order(conditions))
        })
    }
}

impl<'a> From<&'a PlainRoute> for HostRoute<'a> {
    fn from((path, pool): &'a PlainRoute) -> HostRoute<'a> {
        HostRoute {
            path,
            conditions: None,
            pool,
        }
    }
}

impl<'a> From<&'a ConditionalRoute> for HostRoute<'a> {
    fn from(route: &'a ConditionalRoute) -> HostRoute<'a> {
        HostRoute {
            path: &route.path,
            conditions: Some(&route.conditions),
            pool: &route.pool,
        }
    }
}

fn order(known: &str, path: &str) -> Ordering {
    path.len().cmp(&known.len()).then_with(|| known.cmp(path))
}

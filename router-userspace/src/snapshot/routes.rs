//! The routes of one host, in the order in which the router tries them.

use std::cmp::Ordering;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::route::Pool;
use crate::route::conditions::Conditions;

/// The routes of one host, longest path first and equally long ones in byte order: the most specific
/// that matches is the first, and a path can be found by binary search.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostRoutes {
    /// Those without conditions. Most hosts have one, and it stands in place.
    pub paths: SmallVec<[(Arc<str>, Arc<Pool>); 1]>,
    /// The others, sorted as those are, of one path in the [order](Conditions::order) of their
    /// conditions. Most hosts have none, and pay a pointer.
    conditional: Option<Arc<Vec<ConditionalRoute>>>,
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

impl HostRoutes {
    pub fn conditional(&self) -> &[ConditionalRoute] {
        self.conditional.as_deref().map_or(&[], Vec::as_slice)
    }

    /// How many, with and without conditions.
    pub fn count(&self) -> usize {
        self.paths.len() + self.conditional().len()
    }

    /// All routes, those with conditions first.
    pub fn iter(&self) -> impl Iterator<Item = HostRoute<'_>> {
        let conditional = self.conditional().iter().map(HostRoute::from);
        conditional.chain(self.paths.iter().map(HostRoute::from))
    }

    pub fn pools(&self) -> impl Iterator<Item = &Arc<Pool>> {
        self.iter().map(|route| route.pool)
    }

    pub fn get(&self, path: &str, conditions: Option<&Conditions>) -> Option<HostRoute<'_>> {
        match conditions {
            None => {
                let at = self.place(path).ok()?;
                Some(HostRoute::from(&self.paths[at]))
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
        match conditions {
            None => {
                let at = self.place(path).ok()?;
                Some(&mut self.paths[at].1)
            }
            Some(conditions) => {
                let at = self.conditional_place(path, conditions).ok()?;
                let routes = Arc::make_mut(self.conditional.as_mut()?);
                Some(&mut routes[at].pool)
            }
        }
    }

    /// Adds a route, or replaces the pool of the one that is there.
    pub fn insert(&mut self, path: Arc<str>, conditions: Option<Arc<Conditions>>, pool: Arc<Pool>) {
        if let Some(known) = self.get_mut(&path, conditions.as_deref()) {
            *known = pool;
            return;
        }
        match conditions {
            None => {
                let at = self.place(&path).unwrap_or_else(|at| at);
                self.paths.insert(at, (path, pool));
            }
            Some(conditions) => {
                let at = self.conditional_place(&path, &conditions);
                let route = ConditionalRoute {
                    path,
                    conditions,
                    pool,
                };
                let routes = Arc::make_mut(self.conditional.get_or_insert_default());
                routes.insert(at.unwrap_or_else(|at| at), route);
            }
        }
    }

    /// Removes a route; one that is not there is no error.
    pub fn remove(&mut self, path: &str, conditions: Option<&Conditions>) {
        match conditions {
            None => {
                if let Ok(at) = self.place(path) {
                    self.paths.remove(at);
                }
            }
            Some(conditions) => {
                let at = self.conditional_place(path, conditions);
                if let (Ok(at), Some(routes)) = (at, &mut self.conditional) {
                    let routes = Arc::make_mut(routes);
                    routes.remove(at);
                    if routes.is_empty() {
                        self.conditional = None;
                    }
                }
            }
        }
    }

    /// Where a path is among those without conditions, or belongs.
    fn place(&self, path: &str) -> Result<usize, usize> {
        self.paths.binary_search_by(|(known, _)| order(known, path))
    }

    fn conditional_place(&self, path: &str, conditions: &Conditions) -> Result<usize, usize> {
        self.conditional().binary_search_by(|known| {
            order(&known.path, path).then_with(|| known.conditions.order(conditions))
        })
    }
}

impl<'a> From<&'a (Arc<str>, Arc<Pool>)> for HostRoute<'a> {
    fn from((path, pool): &'a (Arc<str>, Arc<Pool>)) -> HostRoute<'a> {
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

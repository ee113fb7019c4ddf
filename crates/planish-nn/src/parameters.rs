//! One walk over every array of a model, from which training, saving and checkpointing all take their lists.

use std::ops::{Deref, DerefMut};

use planish_mlx::Array;

/// Which arrays of a model an optimizer changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Trainable {
    /// The adapters; the base model is frozen.
    #[default]
    Adapters,
    /// Every weight (full fine-tuning); adapters, if any, are frozen.
    Weights,
}

/// What an array is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Part of the base model.
    Weight,
    /// Part of an adapter.
    Adapter,
    /// Packed or otherwise not differentiable.
    Constant,
}

impl Trainable {
    pub(crate) fn includes(self, role: Role) -> bool {
        match self {
            Trainable::Adapters => role == Role::Adapter,
            Trainable::Weights => role == Role::Weight,
        }
    }
}

/// Called with the array's name, role and place.
pub(crate) type Visitor<'a> = dyn FnMut(&str, Role, &mut Array) + 'a;

/// A part of a model that can list its arrays, always in the same order.
pub(crate) trait Parameters: Clone {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>);

    /// The trainable arrays, in the order of the walk. Copies are handles: they share their buffers with the model.
    fn collect(&self, trainable: Trainable) -> Vec<(String, Array)> {
        let mut found = Vec::new();
        // The walk wants places to write to; a copy of the handles gives them without a second, read-only walk.
        self.clone().visit("", &mut |name, role, array| {
            if trainable.includes(role) {
                found.push((name.to_owned(), array.clone()));
            }
        });
        found
    }

    /// Puts `values` in the places of the trainable arrays, in the order of the walk.
    fn replace(&mut self, trainable: Trainable, values: &[Array]) {
        let mut values = values.iter();
        self.visit("", &mut |_, role, array| {
            if trainable.includes(role)
                && let Some(value) = values.next()
            {
                *array = value.clone();
            }
        });
    }
}

/// A module with its name in the files, relative to its layer.
#[derive(Debug, Clone)]
pub(crate) struct Named<M> {
    pub(crate) name: &'static str,
    pub(crate) module: M,
}

impl<M> Deref for Named<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.module
    }
}

impl<M> DerefMut for Named<M> {
    fn deref_mut(&mut self) -> &mut M {
        &mut self.module
    }
}

impl<M: Parameters> Parameters for Named<M> {
    /// `path` is that of the layer.
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        self.module.visit(&join(path, self.name), visitor);
    }
}

impl<M: Parameters> Parameters for Option<M> {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        if let Some(module) = self {
            module.visit(path, visitor);
        }
    }
}

/// `path.name`, or `name` at the root.
pub(crate) fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

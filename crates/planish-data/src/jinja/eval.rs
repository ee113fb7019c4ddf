//! Runs a parsed template.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::arguments::{Args, int_or, text_or};
use super::ast::{Arguments, Comparison, Const, Expr, For, Kind, Macro, Name, Node, Target};
use super::value::{Callable, LoopState, Result, SeqKind, Text, Value};
use super::{Fault, filters, meter, methods, ops, predicates, python};

/// Variables of a block, and those around it.
#[derive(Debug)]
pub(super) struct Scope {
    variables: RefCell<Vec<(Name, Value)>>,
    parent: Option<Rc<Scope>>,
}

/// What a statement does to the loop around it.
#[derive(PartialEq)]
enum Flow {
    Next,
    Break,
    Continue,
}

/// One rendering.
pub(super) struct Interpreter {
    /// Seconds since 1970 that `strftime_now` shows.
    now: i64,
    line: usize,
    depth: usize,
    /// Texts of the blocks that filters are applied to.
    bodies: Vec<Value>,
    /// Scopes that macros hold and namespaces, which may hold one another in circles.
    circles: (Vec<Rc<Scope>>, Vec<Value>),
    random: u64,
}

/// Levels of calls, blocks and expressions; the stack has an end.
const MAX_DEPTH: usize = 240;
const FUNCTIONS: [&str; 7] = [
    "range",
    "dict",
    "namespace",
    "cycler",
    "joiner",
    "raise_exception",
    "strftime_now",
];

/// Renders a template with these variables.
pub(super) fn render(nodes: &[Node], variables: Vec<(Name, Value)>, now: i64) -> std::result::Result<String, Fault> {
    let mut interpreter = Interpreter {
        now,
        line: 1,
        depth: 0,
        bodies: Vec::new(),
        circles: (Vec::new(), Vec::new()),
        // Any fixed seed: what is random in a template shall be the same in each run.
        random: 0x9e37_79b9_7f4a_7c15,
    };
    let scope = Rc::new(Scope {
        variables: RefCell::new(variables),
        parent: None,
    });
    let mut out = String::new();
    let done = interpreter.block(nodes, &scope, &mut out);
    let line = interpreter.line;
    interpreter.break_circles();
    match done {
        Ok(_) => Ok(out),
        Err(message) => Err(Fault { line, message }),
    }
}

impl Scope {
    fn inside(parent: &Rc<Self>) -> Rc<Self> {
        Rc::new(Self {
            variables: RefCell::new(Vec::new()),
            parent: Some(parent.clone()),
        })
    }

    fn get(&self, name: &str) -> Option<Value> {
        let own = self.variables.borrow();
        match own.iter().find(|(known, _)| **known == *name) {
            Some((_, value)) => Some(value.clone()),
            None => self.parent.as_ref()?.get(name),
        }
    }

    fn set(&self, name: &Name, value: Value) {
        let mut own = self.variables.borrow_mut();
        match own.iter_mut().find(|(known, _)| known == name) {
            Some((_, slot)) => *slot = value,
            None => own.push((name.clone(), value)),
        }
    }
}

impl Interpreter {
    fn break_circles(&mut self) {
        let (scopes, namespaces) = std::mem::take(&mut self.circles);
        for scope in scopes {
            scope.variables.take();
        }
        for namespace in &namespaces {
            if let Value::Namespace(fields) = namespace {
                fields.take();
            }
        }
    }

    fn block(&mut self, nodes: &[Node], scope: &Rc<Scope>, out: &mut String) -> Result<Flow> {
        self.deeper()?;
        for node in nodes {
            meter::steps(1)?;
            let flow = self.node(node, scope, out)?;
            if flow != Flow::Next {
                self.depth -= 1;
                return Ok(flow);
            }
        }
        self.depth -= 1;
        Ok(Flow::Next)
    }

    fn deeper(&mut self) -> Result<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("the template calls itself too often".into());
        }
        Ok(())
    }

    fn node(&mut self, node: &Node, scope: &Rc<Scope>, out: &mut String) -> Result<Flow> {
        match node {
            Node::Text(text) => write(out, text)?,
            Node::Print(expr) => match self.eval(expr, scope)? {
                Value::Text(text) => write(out, &text)?,
                other => write(out, &python::text(&other)?)?,
            },
            Node::If { branches, otherwise } => {
                for (test, body) in branches {
                    if self.eval(test, scope)?.is_true() {
                        return self.block(body, scope, out);
                    }
                }
                return self.block(otherwise, scope, out);
            }
            Node::For(code) => {
                let over = self.eval(&code.over, scope)?;
                self.for_loop(code, &over, scope, 0, out)?;
            }
            Node::Set(target, value) => {
                let value = self.eval(value, scope)?;
                assign(target, value, scope)?;
            }
            Node::SetBlock(target, filters, body) => {
                let mut text = self.captured(body, &Scope::inside(scope))?;
                if let Some(filters) = filters {
                    text = self.filtered(filters, text, scope)?;
                }
                assign(target, text, scope)?;
            }
            Node::FilterBlock(filters, body) => {
                let text = self.captured(body, &Scope::inside(scope))?;
                write(out, &python::text(&self.filtered(filters, text, scope)?)?)?;
            }
            Node::Macro(code) => {
                let value = self.callable(code, scope);
                scope.set(&code.name, value);
            }
            Node::CallBlock(call, code) => {
                let caller = self.callable(code, scope);
                let Kind::Call(callee, arguments) = &call.kind else {
                    return Err("{% call %} wants a call".into());
                };
                let callee = self.eval(callee, scope)?;
                let mut args = self.arguments(arguments, scope)?;
                args.keywords.push(("caller".into(), caller));
                write(out, &python::text(&self.call(&callee, args)?)?)?;
            }
            Node::With(values, body) => {
                let inner = Scope::inside(scope);
                for (target, value) in values {
                    let value = self.eval(value, scope)?;
                    assign(target, value, &inner)?;
                }
                return self.block(body, &inner, out);
            }
            Node::Scope(body) => return self.block(body, &Scope::inside(scope), out),
            Node::Break => return Ok(Flow::Break),
            Node::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    fn captured(&mut self, body: &[Node], scope: &Rc<Scope>) -> Result<Value> {
        let mut text = String::new();
        self.block(body, scope, &mut text)?;
        Value::new_text(text)
    }

    fn filtered(&mut self, filters: &Expr, text: Value, scope: &Rc<Scope>) -> Result<Value> {
        self.bodies.push(text);
        let filtered = self.eval(filters, scope);
        self.bodies.pop();
        filtered
    }

    fn callable(&mut self, code: &Arc<Macro>, scope: &Rc<Scope>) -> Value {
        self.circles.0.push(scope.clone());
        Value::Macro(Rc::new(Callable {
            code: code.clone(),
            scope: scope.clone(),
        }))
    }

    fn for_loop(
        &mut self,
        code: &Arc<For>,
        over: &Value,
        scope: &Rc<Scope>,
        depth: usize,
        out: &mut String,
    ) -> Result<()> {
        let mut items = over.iterate()?;
        if let Some(filter) = &code.filter {
            let mut kept = Vec::new();
            for item in items {
                let inner = Scope::inside(scope);
                assign(&code.target, item.clone(), &inner)?;
                if self.eval(filter, &inner)?.is_true() {
                    kept.push(item);
                }
            }
            items = kept;
        }
        if items.is_empty() {
            self.block(&code.otherwise, &Scope::inside(scope), out)?;
            return Ok(());
        }
        let state = Rc::new(LoopState {
            items,
            index: Cell::new(0),
            depth,
            last_changed: RefCell::new(None),
            code: code.recursive.then(|| (code.clone(), scope.clone())),
        });
        for (index, item) in state.items.iter().enumerate() {
            state.index.set(index);
            let inner = Scope::inside(scope);
            inner.set(&"loop".into(), Value::Loop(state.clone()));
            assign(&code.target, item.clone(), &inner)?;
            if self.block(&code.body, &inner, out)? == Flow::Break {
                break;
            }
        }
        Ok(())
    }

    fn eval(&mut self, expr: &Expr, scope: &Rc<Scope>) -> Result<Value> {
        meter::steps(1)?;
        self.line = expr.line;
        self.deeper()?;
        let value = self.kind(expr, scope)?;
        self.depth -= 1;
        Ok(value)
    }

    fn all(&mut self, exprs: &[Expr], scope: &Rc<Scope>) -> Result<Vec<Value>> {
        exprs.iter().map(|expr| self.eval(expr, scope)).collect()
    }

    fn kind(&mut self, expr: &Expr, scope: &Rc<Scope>) -> Result<Value> {
        match &expr.kind {
            Kind::Const(constant) => Ok(constant_value(constant)),
            Kind::Name(name) => Ok(name_value(name, scope)),
            Kind::Body => Ok(self.bodies.last().cloned().unwrap_or(Value::None)),
            Kind::List(items) => Value::list(self.all(items, scope)?),
            Kind::Tuple(items) => Value::seq(SeqKind::Tuple, self.all(items, scope)?),
            Kind::Dict(items) => {
                let mut pairs = Vec::with_capacity(items.len());
                for (key, value) in items {
                    pairs.push((self.eval(key, scope)?, self.eval(value, scope)?));
                }
                Value::dict(pairs)
            }
            Kind::Attribute(value, name) => {
                let value = self.eval(value, scope)?;
                self.line = expr.line;
                ops::attribute(&value, name)
            }
            Kind::Item(value, key) => {
                let (value, key) = (self.eval(value, scope)?, self.eval(key, scope)?);
                self.line = expr.line;
                ops::item(&value, &key)
            }
            Kind::Slice(value, parts) => {
                let value = self.eval(value, scope)?;
                let mut bounds = [Value::None, Value::None, Value::None];
                for (bound, part) in bounds.iter_mut().zip(parts) {
                    if let Some(part) = part {
                        *bound = self.eval(part, scope)?;
                    }
                }
                ops::slice(&value, bounds)
            }
            Kind::Call(callee, arguments) => {
                let callee = self.eval(callee, scope)?;
                let args = self.arguments(arguments, scope)?;
                self.line = expr.line;
                self.call(&callee, args)
            }
            Kind::Filter(value, name, arguments) => {
                let value = self.eval(value, scope)?;
                let args = self.arguments(arguments, scope)?;
                self.line = expr.line;
                filters::apply(self, name, value, args)
            }
            Kind::Test(value, name, arguments) => {
                let value = self.eval(value, scope)?;
                let args = self.arguments(arguments, scope)?;
                self.line = expr.line;
                predicates::check(name, &value, args).map(Value::Bool)
            }
            Kind::Not(value) => Ok(Value::Bool(!self.eval(value, scope)?.is_true())),
            Kind::Negate(value) => ops::negate(&self.eval(value, scope)?),
            Kind::Plus(value) => {
                let value = self.eval(value, scope)?;
                ops::binary(super::ast::Operator::Add, &Value::Int(0), &value)
            }
            Kind::Binary(operator, left, right) => {
                let (left, right) = (self.eval(left, scope)?, self.eval(right, scope)?);
                self.line = expr.line;
                ops::binary(*operator, &left, &right)
            }
            Kind::Concat(parts) => {
                let mut text = String::new();
                for part in parts {
                    write(&mut text, &python::text(&self.eval(part, scope)?)?)?;
                }
                Ok(Value::text(text))
            }
            Kind::Compare(first, rest) => self.compare(first, rest, scope),
            Kind::And(left, right) => {
                let left = self.eval(left, scope)?;
                if left.is_true() {
                    self.eval(right, scope)
                } else {
                    Ok(left)
                }
            }
            Kind::Or(left, right) => {
                let left = self.eval(left, scope)?;
                if left.is_true() {
                    Ok(left)
                } else {
                    self.eval(right, scope)
                }
            }
            Kind::If(test, value, otherwise) => match (self.eval(test, scope)?.is_true(), otherwise) {
                (true, _) => self.eval(value, scope),
                (false, Some(otherwise)) => self.eval(otherwise, scope),
                (false, None) => Ok(Value::undefined(
                    "the inline if-expression has no else, and its condition is false",
                )),
            },
        }
    }

    fn compare(&mut self, first: &Expr, rest: &[(Comparison, Expr)], scope: &Rc<Scope>) -> Result<Value> {
        use std::cmp::Ordering;
        let mut left = self.eval(first, scope)?;
        for (comparison, right) in rest {
            let right = self.eval(right, scope)?;
            let holds = match comparison {
                Comparison::Equal => left.equals(&right)?,
                Comparison::Unequal => !left.equals(&right)?,
                Comparison::In => right.contains(&left)?,
                Comparison::NotIn => !right.contains(&left)?,
                ordered => {
                    if let Value::Undefined(message) = [&left, &right]
                        .into_iter()
                        .find(|it| it.is_undefined())
                        .unwrap_or(&left)
                    {
                        return Err(message.to_string());
                    }
                    let order = left.compare(&right)?;
                    match ordered {
                        Comparison::Less => order == Ordering::Less,
                        Comparison::LessEqual => order != Ordering::Greater,
                        Comparison::Greater => order == Ordering::Greater,
                        _ => order != Ordering::Less,
                    }
                }
            };
            if !holds {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    fn arguments(&mut self, arguments: &Arguments, scope: &Rc<Scope>) -> Result<Args> {
        let mut args = Args {
            positional: self.all(&arguments.positional, scope)?,
            keywords: Vec::with_capacity(arguments.keywords.len()),
        };
        if let Some(spread) = &arguments.spread {
            args.positional.extend(self.eval(spread, scope)?.iterate()?);
        }
        for (name, value) in &arguments.keywords {
            args.keywords.push((name.clone(), self.eval(value, scope)?));
        }
        if let Some(spread) = &arguments.spread_keywords {
            let Value::Dict(dict) = self.eval(spread, scope)? else {
                return Err("argument after ** must be a mapping".into());
            };
            for (key, value) in dict.items() {
                let name = key.as_str().ok_or("keywords must be strings")?;
                args.keywords.push((name.into(), value.clone()));
            }
        }
        Ok(args)
    }

    fn call(&mut self, callee: &Value, args: Args) -> Result<Value> {
        match callee {
            Value::Method(bound) => methods::call(&bound.0, &bound.1, args),
            Value::Macro(callable) => self.call_macro(callable, args),
            Value::Function(name) => self.function(name, args),
            Value::Loop(state) => {
                let Some((code, scope)) = &state.code else {
                    return Err("The loop must have the 'recursive' marker to be called recursively.".into());
                };
                let [over] = args.bind("loop", ["iterable"])?;
                let mut text = String::new();
                let over = over.ok_or("loop() wants what to go through")?;
                self.for_loop(code, &over, scope, state.depth + 1, &mut text)?;
                Value::new_text(text)
            }
            Value::Joiner(state) => {
                args.bind::<0>("joiner", [])?;
                Ok(if state.1.replace(true) {
                    Value::Text(state.0.clone())
                } else {
                    Value::text("")
                })
            }
            Value::Undefined(message) => Err(message.to_string()),
            other => Err(format!("'{}' object is not callable", other.type_name())),
        }
    }

    fn call_macro(&mut self, callable: &Callable, mut args: Args) -> Result<Value> {
        let code = &callable.code;
        let scope = Scope::inside(&callable.scope);
        let taken = args.positional.len().min(code.parameters.len());
        let more = args.positional.split_off(taken);
        for (name, _) in &code.parameters[taken..] {
            let given = args.keywords.iter().position(|(keyword, _)| keyword == name);
            args.positional.push(match given {
                Some(at) => args.keywords.remove(at).1,
                None => Value::undefined(format!("parameter '{name}' was not provided")),
            });
        }
        // A default may use the parameters before it.
        for ((name, default), value) in code.parameters.iter().zip(args.positional) {
            let value = match (default, value.is_undefined()) {
                (Some(default), true) => self.eval(default, &scope)?,
                _ => value,
            };
            scope.set(name, value);
        }
        if let Some(at) = args.keywords.iter().position(|(name, _)| &**name == "caller") {
            let (name, caller) = args.keywords.remove(at);
            scope.set(&name, caller);
        }
        let uses = |name: &str| code.mentions.iter().any(|it| **it == *name);
        if uses("varargs") {
            scope.set(&"varargs".into(), Value::seq(SeqKind::Tuple, more)?);
        } else if !more.is_empty() {
            let most = code.parameters.len();
            return Err(format!("macro '{}' takes not more than {most} argument(s)", code.name));
        }
        if uses("kwargs") {
            let pairs = args
                .keywords
                .into_iter()
                .map(|(name, value)| (Value::text(&*name), value));
            scope.set(&"kwargs".into(), Value::dict(pairs.collect())?);
        } else if let Some((name, _)) = args.keywords.first() {
            return Err(format!("macro '{}' takes no keyword argument '{name}'", code.name));
        }
        self.captured(&code.body, &scope)
    }

    fn function(&mut self, name: &str, mut args: Args) -> Result<Value> {
        match name {
            "range" => range(args),
            "dict" => {
                let mut pairs = Vec::new();
                if let Some(first) = args.positional.pop() {
                    let given = if let Value::Dict(_) = first {
                        methods::items(&first)?
                    } else {
                        first
                    };
                    for pair in given.iterate()? {
                        pairs.push((ops::item(&pair, &Value::Int(0))?, ops::item(&pair, &Value::Int(1))?));
                    }
                }
                pairs.extend(
                    args.keywords
                        .into_iter()
                        .map(|(name, value)| (Value::text(&*name), value)),
                );
                Value::dict(pairs)
            }
            "namespace" => {
                let Value::Dict(fields) = self.function("dict", args)? else {
                    return Err("namespace() wants a dictionary".into());
                };
                let named = |(key, value): &(Value, Value)| Some((key.as_str()?.into(), value.clone()));
                let fields: Vec<(Name, Value)> = fields.items().iter().filter_map(named).collect();
                for (name, _) in &fields {
                    check_field(name)?;
                }
                let namespace = Value::Namespace(Rc::new(RefCell::new(fields)));
                self.circles.1.push(namespace.clone());
                meter::room(size_of::<Value>())?;
                Ok(namespace)
            }
            "cycler" => {
                if args.positional.is_empty() {
                    return Err("at least one item has to be provided".into());
                }
                Ok(Value::Cycler(Rc::new((args.positional, Cell::new(0)))))
            }
            "joiner" => {
                let [separator] = args.bind(name, ["sep"])?;
                Ok(Value::Joiner(Rc::new((
                    Text::new(text_or(&separator, ", ")?),
                    Cell::new(false),
                ))))
            }
            "raise_exception" => {
                let [message] = args.bind(name, ["message"])?;
                Err(python::text(&message.unwrap_or(Value::None))?)
            }
            _ => {
                let [format] = args.bind(name, ["format"])?;
                Value::new_text(super::strftime(self.now, text_or(&format, "")?)?)
            }
        }
    }

    /// A number below `count`, the same in each run.
    pub(super) fn random(&mut self, count: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % count.max(1) as u64) as usize
    }
}

fn write(out: &mut String, text: &str) -> Result<()> {
    meter::grown(out.len().saturating_add(text.len()), text.len())?;
    out.push_str(text);
    Ok(())
}

fn constant_value(constant: &Const) -> Value {
    match constant {
        Const::None => Value::None,
        Const::Bool(value) => Value::Bool(*value),
        Const::Float(number) => Value::Float(*number),
        Const::Text(text) => Value::text(text.as_str()),
        Const::Int(digits) => digits
            .parse()
            .map_or_else(|_| Value::BigInt(digits.as_str().into()), Value::Int),
    }
}

fn name_value(name: &Name, scope: &Scope) -> Value {
    scope.get(name).unwrap_or_else(|| {
        let function = FUNCTIONS.into_iter().find(|function| **function == **name);
        function.map_or_else(|| Value::undefined(format!("'{name}' is undefined")), Value::Function)
    })
}

fn assign(target: &Target, value: Value, scope: &Scope) -> Result<()> {
    match target {
        Target::Name(name) => scope.set(name, value),
        Target::Attribute(name, field) => {
            let Some(Value::Namespace(fields)) = scope.get(name) else {
                return Err("cannot assign attribute on non-namespace object".into());
            };
            check_field(field)?;
            let mut fields = fields.borrow_mut();
            let old = match fields.iter_mut().find(|(known, _)| known == field) {
                Some((_, slot)) => Some(std::mem::replace(slot, value)),
                None => {
                    fields.push((field.clone(), value));
                    None
                }
            };
            // What goes may hold this namespace, so it goes after the borrow.
            drop(fields);
            drop(old);
        }
        Target::Tuple(targets) => {
            let values = value.iterate()?;
            let (wanted, found) = (targets.len(), values.len());
            if wanted != found {
                return Err(format!("cannot unpack {found} values into {wanted} names"));
            }
            for (target, value) in targets.iter().zip(values) {
                assign(target, value, scope)?;
            }
        }
    }
    Ok(())
}

fn check_field(name: &str) -> Result<()> {
    if name.starts_with('_') {
        return Err(format!(
            "a namespace takes no name that begins with an underscore: {name:?}"
        ));
    }
    Ok(())
}

fn range(args: Args) -> Result<Value> {
    let [first, second, step] = args.bind("range", ["start", "stop", "step"])?;
    let step = int_or(&step, 1)?;
    let (start, stop) = match second {
        Some(_) => (int_or(&first, 0)?, int_or(&second, 0)?),
        None => (0, int_or(&first, 0)?),
    };
    if step == 0 {
        return Err("range() arg 3 must not be zero".into());
    }
    let distance = if step > 0 {
        stop.saturating_sub(start)
    } else {
        start.saturating_sub(stop)
    };
    let count = usize::try_from(distance.max(0) / step.abs()).unwrap_or(usize::MAX);
    // The limit of Jinja2's sandbox.
    if count > 100_000 {
        return Err("Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000).".into());
    }
    meter::room(count * size_of::<Value>())?;
    let mut numbers = Vec::new();
    let mut at = start;
    while if step > 0 { at < stop } else { at > stop } {
        numbers.push(Value::Int(at));
        at += step;
    }
    Value::seq(SeqKind::Range, numbers)
}

/// `loop.name`
pub(super) fn loop_attribute(state: &Rc<LoopState>, name: &str) -> Result<Option<Value>> {
    let (at, count) = (state.index.get(), state.items.len());
    let number = |number: usize| Value::Int(number as i128);
    let neighbour = |at: Option<usize>, message: &str| {
        at.and_then(|at| state.items.get(at).cloned())
            .unwrap_or_else(|| Value::undefined(message))
    };
    Ok(Some(match name {
        "index" => number(at + 1),
        "index0" => number(at),
        "revindex" => number(count - at),
        "revindex0" => number(count - at - 1),
        "first" => Value::Bool(at == 0),
        "last" => Value::Bool(at + 1 == count),
        "length" => number(count),
        "depth" => number(state.depth + 1),
        "depth0" => number(state.depth),
        "previtem" => neighbour(at.checked_sub(1), "there is no previous item"),
        "nextitem" => neighbour(Some(at + 1), "there is no next item"),
        "cycle" | "changed" => Value::Method(Rc::new((Value::Loop(state.clone()), name.into()))),
        _ => return Ok(None),
    }))
}

/// `loop.cycle(…)` and `loop.changed(…)`
pub(super) fn loop_method(state: &LoopState, name: &str, args: Args) -> Result<Value> {
    if name == "cycle" {
        let count = args.positional.len();
        let chosen = args.positional.into_iter().nth(state.index.get() % count.max(1));
        return chosen.ok_or_else(|| "no items for cycling given".into());
    }
    let now = Value::seq(SeqKind::Tuple, args.positional)?;
    let mut last = state.last_changed.borrow_mut();
    let changed = match &*last {
        Some(last) => !last.equals(&now)?,
        None => true,
    };
    *last = Some(now);
    Ok(Value::Bool(changed))
}

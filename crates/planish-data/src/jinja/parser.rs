//! Tokens to statements and expressions, by the grammar of Jinja2.

use std::sync::Arc;

use super::Fault;
use super::ast::{Arguments, Comparison, Const, Expr, For, Kind, Macro, Name, Node, Operator, Target};
use super::lexer::{Located, Token, tokens};

/// Parses a whole template.
pub(super) fn parse(source: &str) -> Result<Vec<Node>, Fault> {
    let mut parser = Parser {
        tokens: tokens(source)?,
        at: 0,
        depth: 0,
    };
    let (nodes, end) = parser.nodes(&[])?;
    match end {
        None => Ok(nodes),
        Some(end) => Err(parser.fault(format!("{{% {end} %}} ends nothing"))),
    }
}

/// Levels of blocks and expressions inside one another; the stack has an end.
const MAX_DEPTH: usize = 100;

struct Parser {
    tokens: Vec<Located>,
    at: usize,
    depth: usize,
}

type Parsed<T> = Result<T, Fault>;

impl Parser {
    /// Nodes up to one of the tags in `ends`, whose name is taken, or up to the end of the template.
    fn nodes(&mut self, ends: &[&str]) -> Parsed<(Vec<Node>, Option<String>)> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.fault(format!("blocks are nested more than {MAX_DEPTH} deep")));
        }
        let mut nodes = Vec::new();
        let end = loop {
            match self.next() {
                Token::Data(text) => nodes.push(Node::Text(text)),
                Token::PrintBegin => {
                    nodes.push(Node::Print(self.tuple(true, &[])?));
                    self.expect(&Token::PrintEnd)?;
                }
                Token::BlockBegin => {
                    let name = self.name()?;
                    if ends.contains(&name.as_str()) {
                        break Some(name);
                    }
                    nodes.extend(self.statement(&name)?);
                }
                _ if ends.is_empty() => break None,
                _ => {
                    return Err(self.fault(format!(
                        "the template ends, and {{% {} %}} is missing",
                        ends[ends.len() - 1]
                    )));
                }
            }
        };
        self.depth -= 1;
        Ok((nodes, end))
    }

    /// The body of a statement up to its last tag, which is taken whole.
    fn body(&mut self, end: &str) -> Parsed<Vec<Node>> {
        self.begin_body()?;
        let (nodes, _) = self.nodes(&[end])?;
        self.expect(&Token::BlockEnd)?;
        Ok(nodes)
    }

    fn begin_body(&mut self) -> Parsed<()> {
        self.skip(":");
        self.expect(&Token::BlockEnd)
    }

    fn statement(&mut self, name: &str) -> Parsed<Vec<Node>> {
        let line = self.line();
        let node = match name {
            "for" => self.for_loop()?,
            "if" => self.condition()?,
            "set" => self.set()?,
            "macro" => {
                let name: Name = self.name()?.into();
                let parameters = self.parameters()?;
                Node::Macro(self.callable(name, parameters, "endmacro")?)
            }
            "call" => {
                let parameters = if self.peek_is("(") {
                    self.parameters()?
                } else {
                    Vec::new()
                };
                let call = self.expression()?;
                if !matches!(call.kind, Kind::Call(..)) {
                    return Err(self.fault("{% call %} wants a call"));
                }
                Node::CallBlock(call, self.callable("caller".into(), parameters, "endcall")?)
            }
            "filter" => {
                let first = self.filter(Expr { line, kind: Kind::Body })?;
                let chain = self.filters(first)?;
                Node::FilterBlock(chain, self.body("endfilter")?)
            }
            "with" => {
                let mut values = Vec::new();
                while *self.peek() != Token::BlockEnd {
                    if !values.is_empty() {
                        self.expect_operator(",")?;
                    }
                    let target = self.target(&[])?;
                    self.expect_operator("=")?;
                    values.push((target, self.expression()?));
                }
                Node::With(values, self.body("endwith")?)
            }
            // Marks assistant text for trainers that mask by it; it renders its body.
            "generation" => Node::Scope(self.body("endgeneration")?),
            "block" => {
                let name = self.name()?;
                self.begin_body()?;
                let (body, _) = self.nodes(&["endblock"])?;
                self.skip_name(&name);
                self.expect(&Token::BlockEnd)?;
                Node::Scope(body)
            }
            "print" => {
                let mut nodes = vec![Node::Print(self.expression()?)];
                while self.skip(",") {
                    nodes.push(Node::Print(self.expression()?));
                }
                self.expect(&Token::BlockEnd)?;
                return Ok(nodes);
            }
            "break" => self.alone(Node::Break)?,
            "continue" => self.alone(Node::Continue)?,
            other => return Err(self.fault(format!("unknown tag {other:?}"))),
        };
        Ok(vec![node])
    }

    /// A macro, or what `{% call %}` hands over; `varargs` and `kwargs` in its body say that it takes more.
    fn callable(&mut self, name: Name, parameters: Vec<(Name, Option<Expr>)>, end: &str) -> Parsed<Arc<Macro>> {
        let from = self.at;
        let body = self.body(end)?;
        let inside = &self.tokens[from..self.at.min(self.tokens.len())];
        let mentions = ["varargs", "kwargs"].into_iter().filter(|wanted| {
            inside
                .iter()
                .any(|it| matches!(&it.token, Token::Name(name) if name == wanted))
        });
        let mentions = mentions.map(Name::from).collect();
        Ok(Arc::new(Macro {
            name,
            parameters,
            body,
            mentions,
        }))
    }

    fn alone(&mut self, node: Node) -> Parsed<Node> {
        self.expect(&Token::BlockEnd)?;
        Ok(node)
    }

    fn for_loop(&mut self) -> Parsed<Node> {
        let target = self.target(&["in"])?;
        self.expect_name("in")?;
        let over = self.tuple(false, &["recursive"])?;
        let filter = if self.skip_name("if") {
            Some(self.expression()?)
        } else {
            None
        };
        let recursive = self.skip_name("recursive");
        self.begin_body()?;
        let (body, end) = self.nodes(&["else", "endfor"])?;
        let otherwise = if end.as_deref() == Some("else") {
            self.body("endfor")?
        } else {
            self.expect(&Token::BlockEnd)?;
            Vec::new()
        };
        Ok(Node::For(Arc::new(For {
            target,
            over,
            filter,
            recursive,
            body,
            otherwise,
        })))
    }

    fn condition(&mut self) -> Parsed<Node> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(false, &[])?;
            self.begin_body()?;
            let (body, end) = self.nodes(&["elif", "else", "endif"])?;
            branches.push((test, body));
            match end.as_deref() {
                Some("elif") => {}
                Some("else") => {
                    let otherwise = self.body("endif")?;
                    return Ok(Node::If { branches, otherwise });
                }
                _ => {
                    self.expect(&Token::BlockEnd)?;
                    return Ok(Node::If {
                        branches,
                        otherwise: Vec::new(),
                    });
                }
            }
        }
    }

    fn set(&mut self) -> Parsed<Node> {
        let target = self.target(&[])?;
        if self.skip("=") {
            let value = self.tuple(true, &[])?;
            self.expect(&Token::BlockEnd)?;
            return Ok(Node::Set(target, value));
        }
        let line = self.line();
        let filters = if self.peek_is("|") {
            Some(self.filters(Expr { line, kind: Kind::Body })?)
        } else {
            None
        };
        Ok(Node::SetBlock(target, filters, self.body("endset")?))
    }

    fn parameters(&mut self) -> Parsed<Vec<(Name, Option<Expr>)>> {
        self.expect_operator("(")?;
        let mut parameters: Vec<(Name, Option<Expr>)> = Vec::new();
        while !self.skip(")") {
            if !parameters.is_empty() {
                self.expect_operator(",")?;
            }
            let name = self.name()?.into();
            let default = if self.skip("=") { Some(self.expression()?) } else { None };
            parameters.push((name, default));
        }
        Ok(parameters)
    }

    /// One name, several separated by commas, or an attribute of a namespace.
    fn target(&mut self, ends: &[&str]) -> Parsed<Target> {
        let mut targets = vec![self.one_target()?];
        let mut is_tuple = false;
        while self.skip(",") {
            is_tuple = true;
            if ends.iter().any(|end| self.peek_is_name(end)) || self.peek_is("=") {
                break;
            }
            targets.push(self.one_target()?);
        }
        Ok(if is_tuple {
            Target::Tuple(targets)
        } else {
            targets.remove(0)
        })
    }

    fn one_target(&mut self) -> Parsed<Target> {
        if self.skip("(") {
            let inner = self.target(&[])?;
            self.expect_operator(")")?;
            return Ok(inner);
        }
        let name: Name = self.name()?.into();
        if matches!(&*name, "true" | "false" | "none" | "True" | "False" | "None") {
            return Err(self.fault(format!("cannot assign to {name:?}")));
        }
        Ok(if self.skip(".") {
            Target::Attribute(name, self.name()?.into())
        } else {
            Target::Name(name)
        })
    }

    /// An expression, or several separated by commas, which are a tuple.
    fn tuple(&mut self, with_if: bool, ends: &[&str]) -> Parsed<Expr> {
        let line = self.line();
        let mut items = Vec::new();
        let mut is_tuple = false;
        loop {
            let at_end = matches!(self.peek(), Token::PrintEnd | Token::BlockEnd)
                || self.peek_is(")")
                || ends.iter().any(|end| self.peek_is_name(end));
            if at_end && !items.is_empty() {
                break;
            }
            items.push(if with_if { self.expression()? } else { self.or()? });
            if !self.skip(",") {
                break;
            }
            is_tuple = true;
        }
        Ok(match items.pop() {
            Some(only) if !is_tuple => only,
            last => {
                items.extend(last);
                Expr {
                    line,
                    kind: Kind::Tuple(items),
                }
            }
        })
    }

    fn expression(&mut self) -> Parsed<Expr> {
        let line = self.line();
        let mut value = self.or()?;
        while self.skip_name("if") {
            let test = Box::new(self.or()?);
            let otherwise = if self.skip_name("else") {
                Some(Box::new(self.expression()?))
            } else {
                None
            };
            value = Expr {
                line,
                kind: Kind::If(test, Box::new(value), otherwise),
            };
        }
        Ok(value)
    }

    fn or(&mut self) -> Parsed<Expr> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.fault(format!("expressions are nested more than {MAX_DEPTH} deep")));
        }
        let line = self.line();
        let mut left = self.and()?;
        while self.skip_name("or") {
            let right = self.and()?;
            left = Expr {
                line,
                kind: Kind::Or(Box::new(left), Box::new(right)),
            };
        }
        self.depth -= 1;
        Ok(left)
    }

    fn and(&mut self) -> Parsed<Expr> {
        let line = self.line();
        let mut left = self.not()?;
        while self.skip_name("and") {
            let right = self.not()?;
            left = Expr {
                line,
                kind: Kind::And(Box::new(left), Box::new(right)),
            };
        }
        Ok(left)
    }

    fn not(&mut self) -> Parsed<Expr> {
        let line = self.line();
        let mut negations = 0;
        while self.skip_name("not") {
            negations += 1;
        }
        let mut value = self.compare()?;
        for _ in 0..negations {
            value = Expr {
                line,
                kind: Kind::Not(Box::new(value)),
            };
        }
        Ok(value)
    }

    fn compare(&mut self) -> Parsed<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut rest = Vec::new();
        while let Some(comparison) = self.comparison() {
            rest.push((comparison, self.sum()?));
        }
        Ok(if rest.is_empty() {
            first
        } else {
            Expr {
                line,
                kind: Kind::Compare(Box::new(first), rest),
            }
        })
    }

    fn comparison(&mut self) -> Option<Comparison> {
        let found = match self.peek() {
            Token::Operator("==") => Comparison::Equal,
            Token::Operator("!=") => Comparison::Unequal,
            Token::Operator("<") => Comparison::Less,
            Token::Operator("<=") => Comparison::LessEqual,
            Token::Operator(">") => Comparison::Greater,
            Token::Operator(">=") => Comparison::GreaterEqual,
            Token::Name(name) if name == "in" => Comparison::In,
            Token::Name(name) if name == "not" => {
                let follows = self.tokens.get(self.at + 1).map(|it| &it.token);
                if !matches!(follows, Some(Token::Name(name)) if name == "in") {
                    return None;
                }
                self.at += 1;
                Comparison::NotIn
            }
            _ => return None,
        };
        self.at += 1;
        Some(found)
    }

    fn sum(&mut self) -> Parsed<Expr> {
        self.binary(&[("+", Operator::Add), ("-", Operator::Subtract)], Self::concat)
    }

    fn concat(&mut self) -> Parsed<Expr> {
        let line = self.line();
        let mut parts = vec![self.product()?];
        while self.skip("~") {
            parts.push(self.product()?);
        }
        Ok(if parts.len() == 1 {
            parts.remove(0)
        } else {
            Expr {
                line,
                kind: Kind::Concat(parts),
            }
        })
    }

    fn product(&mut self) -> Parsed<Expr> {
        const OPERATORS: [(&str, Operator); 4] = [
            ("*", Operator::Multiply),
            ("/", Operator::Divide),
            ("//", Operator::FloorDivide),
            ("%", Operator::Remainder),
        ];
        self.binary(&OPERATORS, Self::power)
    }

    fn power(&mut self) -> Parsed<Expr> {
        self.binary(&[("**", Operator::Power)], |parser| parser.unary(true))
    }

    fn binary(&mut self, operators: &[(&str, Operator)], operand: fn(&mut Self) -> Parsed<Expr>) -> Parsed<Expr> {
        let mut left = operand(self)?;
        while let Some((_, operator)) = operators.iter().find(|(symbol, _)| self.peek_is(symbol)) {
            let line = self.line();
            self.at += 1;
            let right = operand(self)?;
            left = Expr {
                line,
                kind: Kind::Binary(*operator, Box::new(left), Box::new(right)),
            };
        }
        Ok(left)
    }

    fn unary(&mut self, with_filters: bool) -> Parsed<Expr> {
        let line = self.line();
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.fault(format!("expressions are nested more than {MAX_DEPTH} deep")));
        }
        let value = if self.skip("-") {
            Expr {
                line,
                kind: Kind::Negate(Box::new(self.unary(false)?)),
            }
        } else if self.skip("+") {
            Expr {
                line,
                kind: Kind::Plus(Box::new(self.unary(false)?)),
            }
        } else {
            self.primary()?
        };
        self.depth -= 1;
        let value = self.postfix(value)?;
        if with_filters { self.filters(value) } else { Ok(value) }
    }

    fn primary(&mut self) -> Parsed<Expr> {
        let line = self.line();
        let kind = match self.next() {
            Token::Name(name) => match name.as_str() {
                "true" | "True" => Kind::Const(Const::Bool(true)),
                "false" | "False" => Kind::Const(Const::Bool(false)),
                "none" | "None" => Kind::Const(Const::None),
                _ => Kind::Name(name.into()),
            },
            Token::Text(mut text) => {
                while let Token::Text(more) = self.peek() {
                    text.push_str(more);
                    self.at += 1;
                }
                Kind::Const(Const::Text(text))
            }
            Token::Int(digits) => Kind::Const(Const::Int(digits)),
            Token::Float(float) => Kind::Const(Const::Float(float)),
            Token::Operator("(") => {
                if self.skip(")") {
                    Kind::Tuple(Vec::new())
                } else {
                    let inner = self.tuple(true, &[])?;
                    self.expect_operator(")")?;
                    return Ok(inner);
                }
            }
            Token::Operator("[") => Kind::List(self.list("]")?),
            Token::Operator("{") => self.dict()?,
            other => {
                self.at = self.at.saturating_sub(1);
                return Err(self.fault(format!("unexpected {}", describe(&other))));
            }
        };
        Ok(Expr { line, kind })
    }

    fn list(&mut self, end: &'static str) -> Parsed<Vec<Expr>> {
        let mut items = Vec::new();
        while !self.skip(end) {
            if !items.is_empty() {
                self.expect_operator(",")?;
                if self.skip(end) {
                    break;
                }
            }
            items.push(self.expression()?);
        }
        Ok(items)
    }

    fn dict(&mut self) -> Parsed<Kind> {
        let mut items = Vec::new();
        while !self.skip("}") {
            if !items.is_empty() {
                self.expect_operator(",")?;
                if self.skip("}") {
                    break;
                }
            }
            let key = self.expression()?;
            self.expect_operator(":")?;
            items.push((key, self.expression()?));
        }
        Ok(Kind::Dict(items))
    }

    fn postfix(&mut self, mut value: Expr) -> Parsed<Expr> {
        loop {
            let line = self.line();
            let kind = if self.skip(".") {
                match self.next() {
                    Token::Name(name) => Kind::Attribute(Box::new(value), name.into()),
                    Token::Int(digits) => {
                        let index = Expr {
                            line,
                            kind: Kind::Const(Const::Int(digits)),
                        };
                        Kind::Item(Box::new(value), Box::new(index))
                    }
                    other => return Err(self.fault(format!("expected a name after \".\", found {}", describe(&other)))),
                }
            } else if self.skip("[") {
                self.subscript(value)?
            } else if self.peek_is("(") {
                Kind::Call(Box::new(value), self.arguments()?)
            } else {
                return Ok(value);
            };
            value = Expr { line, kind };
        }
    }

    fn subscript(&mut self, value: Expr) -> Parsed<Kind> {
        let line = self.line();
        let mut parts: [Option<Box<Expr>>; 3] = [None, None, None];
        if !self.peek_is(":") {
            let index = self.tuple_in_brackets(line)?;
            if self.skip("]") {
                return Ok(Kind::Item(Box::new(value), Box::new(index)));
            }
            parts[0] = Some(Box::new(index));
        }
        for part in &mut parts[1..] {
            if self.skip(":") && !self.peek_is("]") && !self.peek_is(":") {
                *part = Some(Box::new(self.expression()?));
            }
        }
        self.expect_operator("]")?;
        Ok(Kind::Slice(Box::new(value), parts))
    }

    fn tuple_in_brackets(&mut self, line: usize) -> Parsed<Expr> {
        let first = self.expression()?;
        if !self.peek_is(",") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip(",") {
            items.push(self.expression()?);
        }
        Ok(Expr {
            line,
            kind: Kind::Tuple(items),
        })
    }

    fn arguments(&mut self) -> Parsed<Arguments> {
        self.expect_operator("(")?;
        let mut arguments = Arguments::default();
        let mut is_first = true;
        while !self.skip(")") {
            if !is_first {
                self.expect_operator(",")?;
                if self.skip(")") {
                    break;
                }
            }
            is_first = false;
            let names_follow = matches!(
                self.tokens.get(self.at + 1).map(|it| &it.token),
                Some(Token::Operator("="))
            );
            if self.skip("*") {
                arguments.spread = Some(Box::new(self.expression()?));
            } else if self.skip("**") {
                arguments.spread_keywords = Some(Box::new(self.expression()?));
            } else if matches!(self.peek(), Token::Name(_)) && names_follow {
                let name = self.name()?.into();
                self.at += 1;
                arguments.keywords.push((name, self.expression()?));
            } else if arguments.keywords.is_empty() {
                arguments.positional.push(self.expression()?);
            } else {
                return Err(self.fault("an argument without a name follows one with a name"));
            }
        }
        Ok(arguments)
    }

    /// `| filter`, `is test` and calls, in any order.
    fn filters(&mut self, mut value: Expr) -> Parsed<Expr> {
        loop {
            if self.skip("|") {
                value = self.filter(value)?;
            } else if self.peek_is_name("is") {
                value = self.test(value)?;
            } else if self.peek_is("(") {
                let line = self.line();
                let arguments = self.arguments()?;
                value = Expr {
                    line,
                    kind: Kind::Call(Box::new(value), arguments),
                };
            } else {
                return Ok(value);
            }
        }
    }

    fn filter(&mut self, value: Expr) -> Parsed<Expr> {
        let line = self.line();
        let name = self.name()?.into();
        let arguments = if self.peek_is("(") {
            self.arguments()?
        } else {
            Arguments::default()
        };
        Ok(Expr {
            line,
            kind: Kind::Filter(Box::new(value), name, arguments),
        })
    }

    fn test(&mut self, value: Expr) -> Parsed<Expr> {
        let line = self.line();
        self.at += 1;
        let is_negated = self.skip_name("not");
        let name: Name = self.name()?.into();
        let takes_one = match self.peek() {
            Token::Name(name) => !matches!(name.as_str(), "else" | "or" | "and" | "if" | "is" | "not" | "in"),
            Token::Text(_) | Token::Int(_) | Token::Float(_) | Token::Operator("[" | "{") => true,
            _ => false,
        };
        let arguments = if self.peek_is("(") {
            self.arguments()?
        } else if takes_one {
            let argument = self.primary()?;
            Arguments {
                positional: vec![self.postfix(argument)?],
                ..Arguments::default()
            }
        } else {
            Arguments::default()
        };
        let test = Expr {
            line,
            kind: Kind::Test(Box::new(value), name, arguments),
        };
        Ok(if is_negated {
            Expr {
                line,
                kind: Kind::Not(Box::new(test)),
            }
        } else {
            test
        })
    }

    fn peek(&self) -> &Token {
        self.tokens.get(self.at).map_or(&Token::End, |it| &it.token)
    }

    fn next(&mut self) -> Token {
        let token = self.peek().clone();
        self.at += 1;
        token
    }

    fn line(&self) -> usize {
        let at = self.at.min(self.tokens.len().saturating_sub(1));
        self.tokens.get(at).map_or(1, |it| it.line)
    }

    fn peek_is(&self, operator: &str) -> bool {
        matches!(self.peek(), Token::Operator(found) if *found == operator)
    }

    fn peek_is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Token::Name(found) if found == name)
    }

    fn skip(&mut self, operator: &str) -> bool {
        let found = self.peek_is(operator);
        self.at += usize::from(found);
        found
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let found = self.peek_is_name(name);
        self.at += usize::from(found);
        found
    }

    fn name(&mut self) -> Parsed<String> {
        match self.next() {
            Token::Name(name) => Ok(name),
            other => {
                self.at -= 1;
                Err(self.fault(format!("expected a name, found {}", describe(&other))))
            }
        }
    }

    fn expect_name(&mut self, name: &str) -> Parsed<()> {
        if self.skip_name(name) {
            return Ok(());
        }
        Err(self.fault(format!("expected {name:?}, found {}", describe(self.peek()))))
    }

    fn expect_operator(&mut self, operator: &'static str) -> Parsed<()> {
        self.expect(&Token::Operator(operator))
    }

    fn expect(&mut self, token: &Token) -> Parsed<()> {
        if self.peek() == token {
            self.at += 1;
            return Ok(());
        }
        Err(self.fault(format!("expected {}, found {}", describe(token), describe(self.peek()))))
    }

    fn fault(&self, message: impl Into<String>) -> Fault {
        Fault {
            line: self.line(),
            message: message.into(),
        }
    }
}

fn describe(token: &Token) -> String {
    match token {
        Token::Data(_) => "text".into(),
        Token::PrintBegin => "\"{{\"".into(),
        Token::PrintEnd => "\"}}\"".into(),
        Token::BlockBegin => "\"{%\"".into(),
        Token::BlockEnd => "\"%}\"".into(),
        Token::Name(name) => format!("{name:?}"),
        Token::Text(text) => format!("the string {text:?}"),
        Token::Int(digits) => digits.clone(),
        Token::Float(float) => float.to_string(),
        Token::Operator(operator) => format!("{operator:?}"),
        Token::End => "the end of the template".into(),
    }
}

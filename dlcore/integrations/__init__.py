"""dlcore inside other libraries, each an optional extra that `import dlcore` never imports."""
